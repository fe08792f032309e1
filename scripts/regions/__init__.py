"""Region features as the field's detectors write them, read into the arrays of an image database."""
