import utils  # noqa: F401 - for the message if a package is missing
