"""The report page: complete, self-contained, true to the masks it shows."""
import base64
import io
import json
import re
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from pipeline import report
from segmentation import camfile
from segmentation.benchmark import IGNORE, Benchmark
from segmentation.files import replacing
from segmentation.masks import write_mask

CLASSES = ["<cat> & dog", "bird"]
LABELS = {"one": [1], "both": [0, 1], "tall": [0]}
SIZES = {"one": (20, 30), "both": (31, 17), "tall": (40, 1)}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A folder with what all steps leave behind, for three random images."""
    root = tmp_path_factory.mktemp("results")
    rng = np.random.default_rng(0)
    palette = Benchmark("tiny", CLASSES).palette
    (root / "images").mkdir()
    for name, keys in LABELS.items():
        size = SIZES[name]
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(root / "images" / f"{name}.jpg")
        maps = rng.random((len(keys), 3, 4), np.float32)
        camfile.write(root / "cams", name, keys, {"highres": maps, "attn_highres": maps[:, ::-1]}, size)
        for folder, values in (("masks", [0, 1, 2, IGNORE]), ("truth", [0, 1, 2])):
            write_mask(root / folder / f"{name}.png", rng.choice(values, size).astype(np.uint8), palette)
    classes = {"background": 0.9, CLASSES[0]: 0.25, CLASSES[1]: None}
    for file, exponent in (("initial", 1.0), ("refined", 0.3), ("crf", None)):
        best = {"background": exponent, "Mean IoU": 0.575, "Class IoU": classes}
        with replacing(root / f"{file}.json") as stream:
            stream.write(json.dumps({"best": best, "all": [best]}).encode())
    (root / "split.txt").write_text("".join(f"{name}\n" for name in LABELS))
    return root


def sources(root, truth=True, **changes):
    return report.Sources(
        Benchmark("tiny", CLASSES, **changes),
        str(root / "images"),
        str(root / "cams"),
        str(root / "masks"),
        str(root / "truth") if truth else None,
    )


def score_files(root):
    return [str(root / f"{name}.json") for name in ("initial", "refined", "crf")]


class Page(HTMLParser):
    """The pictures of a page, and whether its tags match."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.pictures, self.text = [], {}, []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "img":
            self.pictures.setdefault(attributes["alt"].strip(), []).append(attributes["src"])
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_page_shows_every_stage_and_fetches_nothing(results):
    html = report.render(sources(results), list(LABELS), score_files(results))
    page = Page(html)
    assert {alt: len(found) for alt, found in page.pictures.items()} == {
        "input": 3, "ground truth": 3, "dense CRF": 3, "pseudo mask": 3,
        "initial CAM, <cat> & dog": 2, "refined CAM, <cat> & dog": 2,
        "initial CAM, bird": 2, "refined CAM, bird": 2,
    }  # fmt: skip
    assert all(src.startswith("data:image/") for found in page.pictures.values() for src in found)
    assert not re.search(r"https?:|<script|<link|@import|url\(", html)
    text = " ".join(" ".join(page.text).split())
    for told in ("57.5", "25.0", "–", "background exponent 1", "background score 0.3", "best pseudo mask"):
        assert told in text


def test_page_without_ground_truth_or_scores(results):
    html = report.render(sources(results, truth=False), list(LABELS), images=2)
    page = Page(html)
    assert "ground truth" not in page.pictures and len(page.pictures["input"]) == 2
    assert "IoU" not in html


def test_page_of_a_benchmark_without_background(results):
    keys = {"has_background": False, "classes": ["sky", "sea", "sand"]}
    source = sources(results, truth=False)
    source = report.replace(source, benchmark=Benchmark("stuff", **keys))
    Page(report.render(source, ["both"]))


def test_masks_are_shown_in_the_palettes_colours(results):
    source = sources(results)
    shown = report.sample(source, "one", report.mask_job(source))
    data = base64.b64decode(shown["truth"].partition(",")[2])
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert pixels.shape == (213, 320, 3)
    expected = report.colours(source.benchmark)[:3]
    assert {tuple(c) for c in pixels.reshape(-1, 3)} == {tuple(c) for c in expected}


def test_unsure_pixels_are_hatched():
    labels = np.full((16, 16), IGNORE, np.uint8)
    labels[:, 8:] = 1
    palette = Benchmark("tiny", CLASSES).palette
    painted = report.paint(labels, palette)
    assert len(np.unique(painted[:, :8])) == 2
    assert (painted[:, 8:] == palette[1]).all()


def test_heat_leaves_the_image_where_there_is_no_activation():
    image = np.full((4, 5, 3), 90, np.uint8)
    cam = np.zeros((4, 5), np.float16)
    cam[2, 2] = 1
    changed = (report.heat(image, cam) != image).any(-1)
    assert changed.sum() == 1 and changed[2, 2]


def test_spread_takes_even_steps_ends_included():
    names = list("abcdefghi")
    assert report.spread(names, 3) == ["a", "e", "i"]
    assert report.spread(names, 1) == ["a"]
    assert report.spread(names, 20) == names


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"best": {}}', '{"best": null}',
    '{"best": {"Mean IoU": 1.0, "Class IoU": {"horse": 1.0}}}'])  # fmt: skip
def test_a_file_without_scores_is_said(tmp_path, content):
    file = tmp_path / "scores.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"scores\.json holds no scores"):
        report.read_stage("CRF", file, ["background"])
    with pytest.raises(FileNotFoundError, match="--json"):
        report.read_stage("CRF", tmp_path / "none.json", [])


def test_command_writes_the_page(results, tmp_path, monkeypatch, capsys):
    yaml = tmp_path / "tiny.yaml"
    yaml.write_text(f"name: tiny\nclasses: {json.dumps(CLASSES)}\n")
    out = tmp_path / "new" / "page.html"
    flags = {
        "dataset": yaml, "img_root": results / "images", "split_file": results / "split.txt",
        "cam_out_dir": results / "cams", "pseudo_mask_dir": results / "masks", "out": out,
    }  # fmt: skip
    words = [str(word) for flag, value in flags.items() for word in (f"--{flag}", value)]
    monkeypatch.setattr(sys, "argv", ["report", *words])
    report.main()
    assert Page(out.read_text()).pictures and str(out) in capsys.readouterr().out


def test_cams_without_the_initial_map_are_said(results, tmp_path):
    camfile.write(tmp_path, "one", [1], {"attn_highres": np.ones((1, 2, 2), np.float32)}, SIZES["one"])
    source = report.replace(sources(results), cam_dir=str(tmp_path))
    with pytest.raises(ValueError, match="--keep_initial"):
        report.render(source, ["one"])
