"""Segmentation of the user's images: golden demo, written files, and errors."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from deeplab.config import Config
from deeplab.predict import main
from deeplab.recipe import RECIPE
from foundation.files import sha256
from segmentation import benchmark as benchmarks
from segmentation.benchmark import Benchmark, voc_palette
from segmentation.figures import labeled_overlay, with_legend
from segmentation.images import image_files
from segmentation.inference import Protocol, resize_by
from segmentation.masks import read_mask
from tests.deeplab.common import fill_a, golden
from tests.weights import parity_image
from training import config as configs
from training.predict import predict
from training.segmenter import Segmenter, Setup

TOY = Benchmark("toy", ["one", "two", "three", "four"])


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    """Golden network A: 5 classes, full width, one block per stage."""
    folder = tmp_path_factory.mktemp("demo")
    (folder / "toy.yaml").write_text("{name: toy, classes: [one, two, three, four]}\n")
    config = configs.read(Config, None, ["model.blocks=[1,1,1,1]", f"data.benchmark={folder}/toy.yaml"])
    torch.save(fill_a(RECIPE.network(config).build(config, TOY)).state_dict(), folder / "weights.pth")
    return Setup(RECIPE, config, str(folder / "weights.pth"), device="cpu")


@pytest.fixture
def run(tmp_path):
    """Folder of a finished run with a small network."""
    (tmp_path / "toy.yaml").write_text("{name: toy, classes: [one, two, three, four]}\n")
    words = ["model.width=4", "model.blocks=[1,1,1,1]", "model.rates=[1,2]"]
    config = configs.read(Config, None, [*words, f"data.benchmark={tmp_path}/toy.yaml"])
    folder = tmp_path / "run"
    folder.mkdir()
    model = fill_a(RECIPE.network(config).build(config, TOY))
    torch.save(model.state_dict(), folder / "checkpoint_final.pth")
    (folder / "config.yaml").write_text(configs.to_yaml(config))
    return folder


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name, size in {"a": (60, 90), "b": (75, 50)}.items():
        Image.fromarray(parity_image(name, *size)).save(folder / f"{name}.png")
    return folder


def test_prediction_matches_golden(setup):
    expected = golden("a_demo")
    image = parity_image("dl:demo", 70, 131)
    for crf, key in [(None, "label"), ("deeplab", "label_crf")]:
        test = replace(setup.config.test, crf=crf)
        segmenter = Segmenter(replace(setup, config=replace(setup.config, test=test)))
        assert segmenter.setup.crf == crf and segmenter.setup.protocol == Protocol()
        shown, labels = predict(segmenter, image, 97)
        np.testing.assert_array_equal(shown[..., ::-1], expected["raw"])  # the golden array is BGR
        assert (labels != expected[key]).mean() <= 1e-3
    network_input = segmenter.network.normalize(shown)[None]
    np.testing.assert_allclose(network_input[:, :, ::3, ::3], expected["input"], rtol=0, atol=1e-5)


def test_coco91_matches_the_published_table():
    benchmark = benchmarks.load("coco14/coco91.yaml")
    table = [f"{index}:{name}" for index, name in enumerate(["background", *benchmark.classes])]
    assert table == golden("a_demo")["table"].tolist()
    assert benchmark.channels == 91 and benchmark.category_ids == [*range(1, 91)]


def test_size_0_keeps_the_size(setup):
    image = parity_image("size", 41, 50)
    shown, labels = predict(Segmenter(setup), image, 0)
    assert shown is image and labels.shape == (41, 50)


def test_masks_have_the_image_size_and_overlays_the_network_size(run, photos, capsys):
    assert main([str(photos), "--run", str(run), "--size", "64", "--device", "cpu"]) == 0
    for name, size, shown in [("a", (60, 90), (43, 64)), ("b", (75, 50), (64, 43))]:
        mask = read_mask(run / "predict" / "masks" / f"{name}.png")
        assert mask.shape == size and mask.max() < 5
        with Image.open(run / "predict" / "overlays" / f"{name}.png") as overlay:
            assert overlay.mode == "RGB" and overlay.width >= shown[1] and overlay.height > shown[0]
    assert str(run / "predict" / "masks") in capsys.readouterr().out


def test_single_image_is_predicted_again_with_other_settings(run, photos, tmp_path):
    flags = [str(photos / "a.png"), "--run", str(run), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(flags) == 0
    assert [file.name for file in (tmp_path / "out" / "masks").iterdir()] == ["a.png"]
    first = (tmp_path / "out" / "masks" / "a.png").read_bytes()
    assert main([*flags, "--crf", "auto", "--scales", "0.5,1.0", "--flip"]) == 0
    assert (tmp_path / "out" / "masks" / "a.png").read_bytes() != first


def test_network_and_settings_are_recorded(run, photos, tmp_path):
    out = tmp_path / "out"
    flags = [str(photos / "a.png"), "--run", str(run), "--out", str(out), "--device", "cpu", "--size", "64"]
    assert main(flags) == 0
    record = json.loads((out / "settings.json").read_text())
    assert record["inputs"] == {"checkpoint": sha256(run / "checkpoint_final.pth")}
    settings = record["settings"]
    assert settings["benchmark"] == f"{tmp_path}/toy.yaml" and settings["model"]["width"] == 4
    assert settings["protocol"]["scales"] == [1.0] and settings["crf"] is None and settings["size"] == 64
    config = configs.read(Config, run / "config.yaml")
    model = RECIPE.network(config).build(config, TOY)
    torch.save(fill_a(model, 1).state_dict(), run / "checkpoint_final.pth")
    assert main(flags) == 0
    again = json.loads((out / "settings.json").read_text())
    assert again["inputs"] == {"checkpoint": sha256(run / "checkpoint_final.pth")} != record["inputs"]


def test_bad_images_are_skipped_and_listed(run, photos):
    (photos / "cut.png").write_bytes((photos / "a.png").read_bytes()[:500])
    (photos / "text.jpg").write_text("no image")
    Image.fromarray(np.zeros((3, 2000, 3), np.uint8)).save(photos / "thin.png")
    (photos / "notes.txt").write_text("no image file")
    assert main([str(photos), "--run", str(run), "--device", "cpu", "--size", "64"]) == 1
    for folder in ("masks", "overlays"):
        assert sorted(file.name for file in (run / "predict" / folder).iterdir()) == ["a.png", "b.png"]
    failed = (run / "predict" / "failed.txt").read_text()
    assert failed.count("\n") == 3 and failed.count("cannot be read") == 2
    assert "is too small for scale" in failed


def figure_of(image, labels, benchmark):
    names = ["background"] * benchmark.has_background + benchmark.classes
    return labeled_overlay(image, labels, names, benchmark.palette, benchmark.has_background)


def test_overlay_and_legend_have_only_the_classes_of_the_mask():
    image = parity_image("labeled_overlay", 60, 400)
    labels = np.zeros((60, 400), np.uint8)
    labels[10:30, 20:60], labels[40:50, 100:300] = 2, 4
    figure = figure_of(image, labels, TOY)
    painted, legend = figure[:60], figure[60:]
    np.testing.assert_array_equal(painted[labels == 0], image[labels == 0])
    for index in range(1, 5):
        color = voc_palette()[index]
        assert (legend == color).all(2).any() == (index in (2, 4))
    half = np.rint(image[11:29, 21:59] * 0.5 + voc_palette()[2] * 0.5)
    np.testing.assert_array_equal(painted[11:29, 21:59], half)
    assert (painted[10, 20:60] == voc_palette()[2]).all() and (painted[10:30, 20] == voc_palette()[2]).all()


def test_first_class_is_painted_without_background_class():
    image, labels = parity_image("floor", 40, 300), np.zeros((40, 300), np.uint8)
    benchmark = Benchmark("flat", ["wall", "floor"], has_background=False)
    assert (figure_of(image, labels, benchmark)[:40] != image).any()
    np.testing.assert_array_equal(figure_of(image, labels, TOY)[:40], image)


def test_legend_grows_with_the_number_of_entries():
    image = parity_image("legend", 50, 120)
    heights = []
    for count in (1, 3, 12):
        entries = [(f"class number {index}", (index, 0, 0)) for index in range(count)]
        figure = with_legend(image, entries)
        np.testing.assert_array_equal(figure[:50, :120], image)
        assert all((figure[50:] == color).all(2).any() for _, color in entries)
        heights.append(len(figure))
    assert heights == sorted(set(heights))


def test_user_errors_are_reported(run, photos, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        main(["nowhere", "--run", str(run)])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="contains no images"):
        main([str(tmp_path / "empty"), "--run", str(run)])
    Image.new("RGB", (9, 9)).save(photos / "a.jpg")
    with pytest.raises(ValueError, match=r"a.jpg and a.png have the same name"):
        image_files(str(photos))
    with pytest.raises(ValueError, match=r"too small for scale 0.032"):
        resize_by(np.zeros((3, 2000, 3), np.uint8), 64 / 2000)


def test_foreign_files_are_not_replaced(run, photos, tmp_path):
    (tmp_path / "set" / "masks").mkdir(parents=True)
    foreign = tmp_path / "set" / "masks" / "a.png"
    foreign.write_bytes((photos / "a.png").read_bytes())
    for source, message in [(foreign, "would be replaced"), (photos, "so this command did not fill it")]:
        with pytest.raises(ValueError, match=message):
            main([str(source), "--run", str(run), "--out", str(tmp_path / "set"), "--device", "cpu"])
    assert foreign.read_bytes() == (photos / "a.png").read_bytes()
