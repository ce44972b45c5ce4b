"""CLS-SEG, the CLIP-ES that TagCLIP segments with, against golden vectors, by stage and by command."""
import json
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import clip
from coco14 import BENCHMARK as COCO14
from pipeline.cams import REFINED, CamSettings, image_cams
from pipeline.cams_cli import main
from pytorch_grad_cam import text_cams
from pytorch_grad_cam.affinity import box_masks, refine
from segmentation import camfile
from segmentation.benchmark import Benchmark
from tests.conftest import parity_image
from voc12 import BENCHMARK as VOC12

GOLDEN = Path(__file__).parents[1] / "golden" / "tagclip"
SIZES = {"tagclip-s0": (80, 112), "tagclip-s1": (49, 100), "tagclip-s2": (64, 64)}
CASES = [
    *(("voc", image) for image in SIZES),
    ("coco", "tagclip-s0"),
    *(("stuff", image) for image in ("tagclip-s0", "tagclip-s2")),
]


@cache
def golden() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "cls_seg.npz") as arrays:
        return dict(arrays)


@cache
def data_sets() -> dict[str, Benchmark]:
    """The three data sets of the golden vectors; COCO-Stuff has one background name."""
    stuff = json.loads((GOLDEN / "classes.json").read_text())["coco_stuff"]
    return {
        "voc": VOC12,
        "coco": COCO14,
        "stuff": Benchmark(
            name="stuff",
            classes=[entry["name"] for entry in stuff],
            prompts=[entry["cam_name"] for entry in stuff],
            backgrounds=["background"],
            box_threshold=0.7,
            has_background=False,
        ),
    }


@pytest.fixture(scope="module")
def model(parity_file):
    return clip.load(parity_file("tiny", 0), device="cpu", round_weights=False)


@pytest.fixture(params=CASES, ids="-".join)
def case(request, model):
    """(reference arrays, image, label features (K, E), background features (M, E), settings)."""
    data, name = request.param
    benchmark, prefix = data_sets()[data], f"{data}/{name}/"
    reference = {key.removeprefix(prefix): value for key, value in golden().items() if key.startswith(prefix)}
    names = [benchmark.prompts[key] for key in reference["keys"]]
    text = clip.text_features(model, names, benchmark.templates)
    backgrounds = clip.text_features(model, benchmark.backgrounds, benchmark.templates)
    settings = CamSettings(box_threshold=benchmark.box_threshold, leave_out_last=data == "voc")
    return reference, parity_image(name, SIZES[name]), text, backgrounds, settings


def difference(mine, reference: np.ndarray) -> float:
    """Largest absolute difference."""
    assert mine.shape == reference.shape
    return np.abs(np.asarray(mine, np.float64) - reference.astype(np.float64)).max()


@pytest.mark.parametrize("data", data_sets())
def test_text_features(data, model):
    benchmark = data_sets()[data]
    names = [*benchmark.prompts, *benchmark.backgrounds]
    assert difference(clip.text_features(model, names, benchmark.templates), golden()[f"{data}/text"]) <= 1e-5


def test_stages(case, model):
    reference, image, text, backgrounds, settings = case
    images = clip.preprocess(image, clip.target_size(*image.size[::-1], model.visual.patch_size))[None]
    result = text_cams(model, images, text[None], backgrounds, leave_out_last=settings.leave_out_last)
    assert difference(result.cams[0], reference["cam"]) <= 1e-4
    masks = box_masks(result.cams, settings.box_threshold)
    np.testing.assert_array_equal(masks[0], reference["boxes"])
    refined = refine(result.cams, result.attention, masks)
    assert difference(refined[0], reference["refined"]) <= 1e-4


def test_maps_as_stored(case, model, tmp_path):
    reference, image, text, backgrounds, settings = case

    def stored(settings):
        maps = image_cams(model, image, text, backgrounds, settings)
        camfile.write(tmp_path, "image", reference["keys"], maps, image.size[::-1])
        return camfile.read(tmp_path, "image", REFINED)[1]

    assert difference(stored(settings), reference["attn_highres"]) <= 2e-3
    other = replace(settings, leave_out_last=not settings.leave_out_last)
    if reference["attn_highres"].any():  # one image's CAM is all zero
        assert difference(stored(other), reference["attn_highres"]) > 2e-3


@pytest.mark.parametrize("data", data_sets())
def test_the_command_with_a_label_file(data, tmp_path, monkeypatch, parity_file):
    benchmark, names = data_sets()[data], [name for other, name in CASES if other == data]
    lines = []
    for name in names:
        parity_image(name, SIZES[name]).save(tmp_path / f"{name}.png")
        lines.append(" ".join(map(str, [name, *golden()[f"{data}/{name}/keys"]])))
    (tmp_path / "tags.txt").write_text("\n".join(lines))
    if data == "stuff":
        fields = ("name", "classes", "prompts", "backgrounds", "box_threshold", "has_background")
        described = {field: getattr(benchmark, field) for field in fields}
        (tmp_path / "stuff.yaml").write_text(json.dumps(described))  # JSON is YAML
    known = str(tmp_path / "stuff.yaml") if data == "stuff" else benchmark.name
    command = ["generate_cams", "--benchmark", known, "--img_root", tmp_path]
    command += ["--cam_out_dir", tmp_path / "cams", "--preset", "cls_seg"]
    command += ["--split_file", tmp_path / "tags.txt", "--labels", tmp_path / "tags.txt"]
    command += ["--model", parity_file("tiny", 0), "--round_weights", "off", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [*map(str, command)])
    assert main() == 0
    for name in names:
        made = np.load(tmp_path / "cams" / f"{name}.npy", allow_pickle=True).item()  # as other projects do
        np.testing.assert_array_equal(made["keys"], golden()[f"{data}/{name}/keys"])
        reference = golden()[f"{data}/{name}/attn_highres"]
        assert made[REFINED].dtype == reference.dtype == np.float16
        assert difference(made[REFINED], reference) <= 2e-3
