"""A tiny data set in VOC layout with golden images, for the tests of the numbered steps."""
from pathlib import Path

import pytest

import voc12
from tests.conftest import parity_image


def write_voc(root: Path, images: dict[str, tuple[tuple[int, int], list[int]]]) -> Path:
    """Write images (name -> (size, labels)) as PNG, with annotations and a split file; return `root`."""
    for folder in ("JPEGImages", "Annotations"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name, (size, labels) in images.items():
        parity_image(name, size).save(root / "JPEGImages" / f"{name}.png")
        objects = "".join(f"<object><name>{voc12.CLASSES[label]}</name></object>" for label in labels)
        (root / "Annotations" / f"{name}.xml").write_text(f"<annotation>{objects}</annotation>")
    (root / "split.txt").write_text("".join(f"{name}\n" for name in images))
    return root


@pytest.fixture
def voc(tmp_path) -> Path:
    """Data set of the golden cases a and b (same weights), and a larger image with one label."""
    images = {"es_a": ((96, 128), [8, 1, 5]), "es_b": ((75, 100), [3]), "other": ((130, 90), [19])}
    return write_voc(tmp_path / "voc", images)
