"""Whether the texts of one database and the images of another fit each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

from data.inspection.report import Report, share


def compare(texts_path: Path, image_of: Mapping[str, str], images_path: Path, images: Collection[str]) -> Report:
    """The report of a pair: ``image_of`` has the image of each text, "" where it has none, ``images`` those that are there."""
    report = Report("fit", f"{texts_path.name} with {images_path.parent.name}/{images_path.name}")
    named = Counter(image for image in image_of.values() if image)
    absent = {image: texts for image, texts in named.items() if image not in images}
    for image, texts in absent.items():
        report.faults.add("images that texts name and the image database lacks", f"{image!r}, of {texts:,} texts")
    alone = [text for text, image in image_of.items() if image not in images]
    report.faults.add_names("texts without an image", alone)
    without = sum(image not in named for image in images)
    if named:
        report.facts["images there"] = share(len(named) - len(absent), len(named), "images that the texts name")
    if image_of:
        report.facts["texts fit"] = share(len(image_of) - len(alone), len(image_of), "texts have their image")
    if images:
        report.facts["no text"] = f"{share(without, len(images), 'images')}, normal if they are of other splits"
    return report
