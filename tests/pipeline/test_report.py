"""The report page is complete and self-contained, and shows the given masks and scores."""
import base64
import io
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from foundation.files import replacing
from pipeline import figures, records, report
from segmentation.benchmark import IGNORE, Benchmark, voc_palette
from segmentation.masks import read_mask, write_mask
from tests.camfiles import write_cams

CLASSES = ["<cat> & dog", "bird"]
LABELS = {"one": [1], "both": [0, 1], "tall": [0]}
SIZES = {"one": (20, 30), "both": (31, 17), "tall": (40, 1)}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Folder with the outputs of all steps for three random images."""
    root = tmp_path_factory.mktemp("results")
    rng = np.random.default_rng(0)
    palette = Benchmark("tiny", CLASSES).palette
    (root / "images").mkdir()
    for name, keys in LABELS.items():
        size = SIZES[name]
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(root / "images" / f"{name}.jpg")
        maps = rng.random((len(keys), 3, 4), np.float32)
        write_cams(root / "cams", name, keys, {"highres": maps, "attn_highres": maps[:, ::-1]}, size)
        for folder, values in (("masks", [0, 1, 2, IGNORE]), ("truth", [0, 1, 2])):
            write_mask(root / folder / f"{name}.png", rng.choice(values, size).astype(np.uint8), palette)
        write_mask(root / "sure" / f"{name}.png", read_mask(root / "truth" / f"{name}.png"), palette)
        write_mask(root / "blank" / f"{name}.png", np.zeros(size, np.uint8), palette)
    classes = {"background": 0.9, CLASSES[0]: 0.25, CLASSES[1]: None}
    for file, exponent in (("initial", 1.0), ("refined", 0.3), ("crf", None)):
        best = {"background": exponent, "Mean IoU": 0.575, "Class IoU": classes}
        with replacing(root / f"{file}.json") as stream:
            stream.write(json.dumps({"best": best, "all": [best]}).encode())
    tags = {"mAP": 0.875, "F1": 0.5, "Precision": 0.625, "Recall": None}
    (root / "tags.json").write_text(json.dumps({"images": 3, **tags, "AP": {}}))
    masks = {"ignored": 0.125, "best": {"background": None, "Mean IoU": 0.375, "Class IoU": classes}}
    (root / "masks.json").write_text(json.dumps(masks))
    (root / "tags.txt").write_text("one 1\nboth 1\ntall 0 1\n")
    (root / "split.txt").write_text("".join(f"{name}\n" for name in LABELS))
    return root


def page_of(root, truth=True, names=LABELS, benchmark=None, **changes):
    """Return the `Results` of the training images, with further fields."""
    return report.Results(
        benchmark or Benchmark("tiny", CLASSES),
        list(names),
        str(root / "images"),
        str(root / "cams"),
        str(root / "masks"),
        str(root / "truth") if truth else None,
        **changes,
    )


def auto_masks(root, **changes):
    """Return the fields of masks from tags: masks equal to the ground truth, and the labels in tags.txt."""
    return {
        "auto_masks": (str(root / "sure"), str(root / "tags.txt")),
        "auto_tags": str(root / "tags.json"),
        "auto_scores": [str(root / "crf.json"), str(root / "masks.json")],
        **changes,
    }


def validation(root, *networks, names=LABELS, **changes):
    """Return the fields of networks whose masks are in folders of `root`, tested on the training images."""
    score_file = str(root / "crf.json")
    return {
        "networks": [report.Network(f"the {name} one", str(root / name), score_file) for name in networks],
        "val_names": list(names),
        "val_image_root": str(root / "images"),
        "val_gt_root": str(root / "truth"),
        **changes,
    }


def score_files(root):
    return [str(root / f"{name}.json") for name in ("initial", "refined", "crf")]


class Page(HTMLParser):
    """The figures of a page, and whether its tags match."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.figures, self.text = [], {}, []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "img":
            self.figures.setdefault(attributes["alt"].strip(), []).append(attributes["src"])
        elif tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_page_shows_every_stage_and_loads_nothing(results):
    html = report.render(page_of(results, scores=score_files(results)))
    page = Page(html)
    assert {alt: len(sources) for alt, sources in page.figures.items()} == {
        "input": 3, "ground truth": 3, "dense CRF": 3, "pseudo mask": 3,
        "initial CAM, <cat> & dog": 2, "refined CAM, <cat> & dog": 2,
        "initial CAM, bird": 2, "refined CAM, bird": 2,
    }  # fmt: skip
    assert all(src.startswith("data:image/") for sources in page.figures.values() for src in sources)
    assert not re.search(r"https?:|<script|<link|@import|url\(", html)
    text = " ".join(" ".join(page.text).split())
    for words in ("57.5", "25.0", "–", "background exponent 1", "background score 0.3", "best pseudo mask"):
        assert words in text


def test_page_without_ground_truth_or_scores(results):
    html = report.render(page_of(results, truth=False), images=2)
    page = Page(html)
    assert "ground truth" not in page.figures and len(page.figures["input"]) == 2
    assert "IoU" not in html


def test_page_shows_the_predictions_of_networks(results):
    trained = validation(results, "sure", "blank", val_scores=score_files(results)[1:])
    html = report.render(page_of(results, scores=score_files(results), note="briefly", **trained), 2)
    page = Page(html)
    for alt, count in {"input": 4, "ground truth": 4, "pseudo mask": 2, "the sure one 100.0 %": 2}.items():
        assert len(page.figures[alt]) == count
    assert len([alt for alt in page.figures if re.fullmatch(r"the blank one [1-9].*\d %", alt)]) == 2
    assert not re.search(r"https?:|<script|<link|@import|url\(", html)
    text = " ".join(" ".join(page.text).split())
    assert text.count("mIoU, with true labels") == text.count("mIoU, without labels") == 2
    assert "briefly" in text
    assert text.count("3 training images") == 3 and text.count("3 validation images") == 3
    assert "best to the worst prediction of the sure one" in text


def test_page_shows_networks_without_other_scores(results):
    html = report.render(page_of(results, truth=False, **validation(results, "blank")))
    text = " ".join(" ".join(Page(html).text).split())
    assert "mIoU, without labels" in text and "with true labels" not in text


def test_page_shows_masks_from_tags(results):
    fields = auto_masks(results) | validation(results, "blank")
    html = report.render(page_of(results, scores=score_files(results), **fields))
    page = Page(html)
    shown = ("input", "ground truth", "pseudo mask", "mask from tags", "initial CAM, bird")
    assert [len(page.figures[alt]) for alt in shown] == [6, 6, 3, 3, 2]
    assert len(set(page.figures["mask from tags"])) == 3
    assert set(page.figures["mask from tags"]) <= set(page.figures["ground truth"])
    text = " ".join(" ".join(page.text).split())
    for words in (
        "mAP 87.5 %", "F1 50.0 %", "Precision 62.5 %", "Recall – %",
        "Pseudo mask 57.5 % mIoU, with true labels",
        "Mask from tags 37.5 % mIoU, without labels 12.5 % ignored",
        "best mask from tags to the worst", "Masks from tags need no annotation",
        "mask from tags: mIoU 100.0 %, 0.0 % ignored",
    ):  # fmt: skip
        assert words in text
    first = "&lt;cat&gt; &amp; dog"
    marked = re.findall(r'<li class="(\w*)"><b>(.*?)</b>', html)
    assert sorted(marked) == [("", first), ("", "bird"), ("", "bird"), ("missed", first), ("wrong", "bird")]


def test_page_of_masks_from_tags_without_ground_truth_or_scores(results):
    fields = auto_masks(results, auto_tags=None, auto_scores=())
    page = Page(report.render(page_of(results, truth=False, **fields)))
    text = " ".join(" ".join(page.text).split())
    assert len(page.figures["mask from tags"]) == 3 and "ground truth" not in page.figures
    assert "mask from tags: 0.0 % ignored" in text and "mAP" not in text and "IoU" not in text


def test_tags_are_compared_with_the_true_labels():
    compared = report.compare_tags([0, 3], [2, 0], ["cat", "dog", "bird", "cow"])
    assert compared == [("bird", "missed"), ("cat", ""), ("cow", "wrong")]


def test_an_image_without_tags_raises(results, tmp_path):
    file = tmp_path / "labels.txt"
    file.write_text("one 1\nboth 0\n")
    fields = auto_masks(results, auto_masks=(str(results / "sure"), str(file)))
    with pytest.raises(ValueError, match=r"labels\.txt has no line for image tall: give the labels"):
        report.render(page_of(results, **fields))


def test_a_mask_of_other_tags_raises(results, tmp_path):
    folder, file = tmp_path / "masks", tmp_path / "labels.txt"
    file.write_text("".join(f"{name} 0\n" for name in LABELS))
    for name in LABELS:
        mask = read_mask(results / "sure" / f"{name}.png")
        write_mask(folder / f"{name}.png", mask, voc_palette(), [1])
    fields = auto_masks(results, auto_masks=(str(folder), str(file)))
    with pytest.raises(ValueError, match=r"was made from other labels than those in .*labels\.txt"):
        report.render(page_of(results, **fields))


def test_settings_that_all_masks_share_are_listed_once(results, tmp_path):
    folders = {}
    for folder, settings in {
        "tags": {"names": list("abcdefghijklmnopqrstuvwxyz"), "averaged": 3},
        "true": {"confidence": 0.95, "cams": 1},
        "auto": {"confidence": 0.95, "cams": 2},
    }.items():
        folders[folder] = tmp_path / folder
        folders[folder].mkdir()
        (folders[folder] / "settings.json").write_text(json.dumps({"settings": settings}))
    made = page_of(results, auto_masks=(str(folders["auto"]), str(folders["tags"] / "labels.txt")))
    assert report.recorded(replace(made, mask_dir=str(folders["true"]))) == [
        ("Step 0, tags", [("names", "a, b, c, … (26 in all)"), ("affinity layers", "3")]),
        ("Step 2b, all masks", [("confidence", "0.95")]),
        ("Step 2b, pseudo masks", [("cams", "1")]),
        ("Step 2b, masks from tags", [("cams", "2")]),
    ]


def test_page_shows_the_scores_of_groups(results, tmp_path):
    grouped = {"classes": ["sky", "cloud", "sea"], "groups": [0, 0, 1], "group_names": ["above", "below"]}
    benchmark = Benchmark("stuff", has_background=False, **grouped)
    truth = np.repeat(np.uint8([0, 1, 2]), 10)[None]
    for folder, mask in {"truth": truth, "masks": np.where(truth == 0, np.uint8(1), truth)}.items():
        write_mask(tmp_path / folder / "one.png", np.ascontiguousarray(mask), benchmark.palette)
    assert report.mask_score(str(tmp_path / "masks"), str(tmp_path / "truth"), "one", benchmark) == 1
    ious = {"above": 0.25, "below": 0.75}
    file = tmp_path / "scores.json"
    file.write_text(json.dumps({"best": {"Mean IoU": 0.5, "Class IoU": ious}}))
    made = page_of(results, truth=False, names=["both"], benchmark=benchmark, scores=[str(file)] * 3)
    page = Page(report.render(made))
    text = " ".join(" ".join(page.text).split())
    assert "above 25.0 25.0 25.0 below 75.0 75.0 75.0 mean" in text
    assert text.count("cloud") == 3  # in the legend, and for two CAMs


def test_predictions_are_ordered_from_best_to_worst(results, tmp_path):
    palette = Benchmark("tiny", CLASSES).palette
    expected = {}
    for rank, name in enumerate(("tall", "one", "both")):
        mask = read_mask(results / "truth" / f"{name}.png")
        mask[: rank * len(mask) // 3] = 0  # later masks contain less of the objects
        write_mask(tmp_path / f"{name}.png", mask, palette)
        expected[name] = report.mask_score(
            str(tmp_path), str(results / "truth"), name, Benchmark("tiny", CLASSES)
        )
    network = report.Network("it", str(tmp_path), "")
    trained = validation(results, networks=[network])
    shown = report.predictions(page_of(results, **trained), 3)
    assert [(it["name"], it["masks"][0]["iou"]) for it in shown] == list(expected.items())
    assert list(expected.values()) == sorted(expected.values(), reverse=True)


def test_settings_that_all_networks_share_are_listed_once(results, tmp_path):
    networks = []
    for name, labels in (("first", "pseudo"), ("second", "truth")):
        masks = tmp_path / name / "test" / "masks"
        masks.mkdir(parents=True)
        trained = {"model.width": 64, "model.init": "", "data.label_dir": labels}
        for folder, settings in ((tmp_path / name, trained), (masks, {"model": {"width": 64}, "flip": True})):
            record = {"settings": settings, "versions": {"torch": "9"}}
            (folder / "settings.json").write_text(json.dumps(record))
        scored = masks.with_name("scores.json")
        scored.write_text(json.dumps({"checkpoint": str(tmp_path / name / "final.pth")}))
        networks.append(report.Network(name, str(masks), str(scored)))
    assert report.recorded(page_of(results, networks=networks)) == [
        ("Step 3, all networks", [("model.width", "64"), ("flip", "yes")]),
        ("Step 3, first", [("data.label dir", "pseudo")]),
        ("Step 3, second", [("data.label dir", "truth")]),
        ("Versions", [("torch", "9")]),
    ]
    alone = report.recorded(page_of(results, networks=networks[:1]))
    assert alone[0] == (
        "Step 3, first", [("model.width", "64"), ("data.label dir", "pseudo"), ("flip", "yes")]
    )  # fmt: skip


def test_a_mask_of_another_size_raises_with_its_name(results, tmp_path):
    write_mask(tmp_path / "one.png", np.zeros((3, 3), np.uint8), Benchmark("tiny", CLASSES).palette)
    with pytest.raises(ValueError, match=r"one\.png: ground truth is"):
        report.mask_score(str(tmp_path), str(results / "truth"), "one", Benchmark("tiny", CLASSES))


def test_networks_with_the_same_title_are_refused(results):
    with pytest.raises(ValueError, match="same title"):
        page_of(results, **validation(results, "sure", "sure"))


def test_page_renders_for_a_benchmark_without_background(results):
    keys = {"has_background": False, "classes": ["sky", "sea", "sand"]}
    benchmark = Benchmark("stuff", **keys)
    Page(report.render(page_of(results, truth=False, names=["both"], benchmark=benchmark)))


def test_masks_are_shown_in_the_colors_of_the_palette(results):
    made = page_of(results)
    shown = report.sample(made, "one", *report.recorded_masks(made))
    data = base64.b64decode(shown["truth"].partition(",")[2])
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert pixels.shape == (213, 320, 3)
    expected = figures.page_palette(made.benchmark)[:3]
    assert {tuple(c) for c in pixels.reshape(-1, 3)} == {tuple(c) for c in expected}


def test_evenly_spaced_includes_both_ends():
    names = list("abcdefghi")
    assert report.evenly_spaced(names, 3) == ["a", "e", "i"]
    assert report.evenly_spaced(names, 1) == ["a"]
    assert report.evenly_spaced(names, 20) == names


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"best": {}}', '{"best": null}',
    '{"best": {"Mean IoU": 1.0, "Class IoU": {"horse": 1.0}}}', "<html>", "[" * 100_000,
    '{"best": {"Mean IoU": NaN, "Class IoU": {"background": 1}}}',
    '{"best": {"Mean IoU": 1e999, "Class IoU": {"background": 1}}}',
    '{"best": {"Mean IoU": 57.5, "Class IoU": {"background": 1}}}',
    '{"best": {"Mean IoU": "0.5", "Class IoU": {"background": 1}}}',
    '{"best": {"Mean IoU": true, "Class IoU": {"background": 1}}}',
    '{"best": {"Mean IoU": 1, "Class IoU": {"background": [1]}}}',
    '{"ignored": "all", "best": {"Mean IoU": 1, "Class IoU": {"background": 1}}}'])  # fmt: skip
def test_a_file_without_scores_raises(tmp_path, content):
    file = tmp_path / "scores.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"scores\.json contains no scores"):
        records.read_stage("CRF", file, ["background"])
    with pytest.raises(ValueError, match=r"scores\.json contains no scores of tags \(.*\): give the file"):
        records.read_tag_scores(file)
    with pytest.raises(FileNotFoundError, match="--json"):
        records.read_stage("CRF", tmp_path / "none.json", [])
    with pytest.raises(FileNotFoundError, match="classify"):
        records.read_tag_scores(tmp_path / "none.json")


def test_checkpoint_of_a_score_file_is_text(tmp_path):
    file = tmp_path / "scores.json"
    for content, checkpoint in ("{}", ""), ('{"checkpoint": null}', ""), ('{"checkpoint": "a.pth"}', "a.pth"):
        file.write_text(content)
        assert records.read_checkpoint(file) == checkpoint
    file.write_text('{"checkpoint": [1]}')
    with pytest.raises(ValueError, match=r"scores\.json contains no scores .an entry has the wrong type"):
        records.read_checkpoint(file)


@pytest.mark.parametrize(
    "settings", [{"crf": [1]}, {"cam_type": [1]}, {"confidence": "x"}, {"crf": {"image_mode": 1}}]
)
def test_damaged_settings_of_masks_raise(tmp_path, settings):
    (tmp_path / "settings.json").write_text(json.dumps({"settings": settings}))
    with pytest.raises(ValueError, match=r"damaged|must be"):
        report.recorded_masks(replace(page_of(tmp_path), mask_dir=str(tmp_path)))


@pytest.fixture
def command(results, tmp_path, monkeypatch):
    """Function that runs the command on the results with further arguments and returns the page."""
    yaml, out = tmp_path / "tiny.yaml", tmp_path / "new" / "page.html"
    yaml.write_text(f"name: tiny\nclasses: {json.dumps(CLASSES)}\n")
    flags = {
        "benchmark": yaml, "image_root": results / "images", "split_file": results / "split.txt",
        "cam_out_dir": results / "cams", "pseudo_mask_dir": results / "masks", "output": out,
    }  # fmt: skip
    words = [str(word) for flag, value in flags.items() for word in (f"--{flag}", value)]

    def run(*more):
        monkeypatch.setattr(sys, "argv", ["report", *words, *map(str, more)])
        report.main()
        return Page(out.read_text())

    return run


def test_command_writes_the_page(command, capsys):
    assert command().figures and "page.html" in capsys.readouterr().out


def test_command_shows_networks(command, results):
    scored = results / "crf.json"
    page = command(
        "--network", "A", results / "sure", scored, "--network", "B", results / "blank", scored,
        "--val_split_file", results / "split.txt", "--val_gt_root", results / "truth",
        "--val_scores", results / "refined.json", scored, "--network_crf", scored, results / "initial.json",
    )  # fmt: skip
    assert len(page.figures["A 100.0 %"]) == 3
    assert "Refined CAM" in page.text and "B" in page.text
    assert sum("57.5 % after a dense CRF" in text for text in page.text) == 2


def test_command_shows_masks_from_tags(command, results):
    page = command(
        "--auto_masks", results / "sure", results / "tags.txt", "--auto_tags", results / "tags.json",
        "--auto_scores", results / "crf.json", results / "masks.json",
    )  # fmt: skip
    assert len(page.figures["mask from tags"]) == 3
    assert {"Pseudo mask", "Mask from tags", "87.5", "37.5"} <= set(page.text)


@pytest.mark.parametrize("words, message", [
    (["--auto_tags", "tags.json"], "--auto_masks"),
    (["--auto_scores", "masks.json", "auto.json"], "--auto_masks"),
    (["--network", "A", "masks", "scores.json"], "--val_split_file"),
    (["--network", "A", "masks", "scores.json", "--val_split_file", "val.txt"], "--gt_root"),
    (["--val_split_file", "val.txt"], "--network"),
    (["--network", "A", "masks", "scores.json", "--val_split_file", "val.txt", "--gt_root", "truth",
      "--network_crf", "a.json", "b.json"], "one file for each"),
    (["--val_scores", "refined.json", "crf.json"], "--network"),
])  # fmt: skip
def test_flags_that_require_other_flags_raise(command, capsys, words, message):
    with pytest.raises(SystemExit) as error:
        command(*words)
    assert error.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_cam_files_without_initial_cams_raise(results, tmp_path):
    write_cams(tmp_path, "one", [1], {"attn_highres": np.ones((1, 2, 2), np.float32)}, SIZES["one"])
    made = replace(page_of(results, names=["one"]), cam_dir=str(tmp_path))
    with pytest.raises(ValueError, match="--keep_initial"):
        report.render(made)
