"""CLS-SEG, TagCLIP's variant of CLIP-ES for segmentation: stages and command against golden vectors."""
import sys
from dataclasses import replace

import numpy as np
import pytest

import clip
from coco14 import BENCHMARK as COCO14
from cocostuff import BENCHMARK as COCOSTUFF
from pipeline.cams import REFINED, CamSettings, image_cams
from pipeline.cams_cli import main
from pytorch_grad_cam import text_cams
from pytorch_grad_cam.affinity import box_masks, refine
from segmentation import camfile
from tests.camfiles import write_cams
from tests.conftest import parity_image
from tests.tagclip.common import golden
from voc12 import BENCHMARK as VOC12

VECTORS = golden("cls_seg")
DATA_SETS = {"voc": VOC12, "coco": COCO14, "stuff": COCOSTUFF}
SIZES = {"tagclip-s0": (80, 112), "tagclip-s1": (49, 100), "tagclip-s2": (64, 64)}
CASES = [
    *(("voc", image) for image in SIZES),
    ("coco", "tagclip-s0"),
    *(("stuff", image) for image in ("tagclip-s0", "tagclip-s2")),
]


@pytest.fixture(scope="module")
def model(parity_file):
    return clip.load(parity_file("tiny", 0), device="cpu", round_weights=False)


@pytest.fixture(params=CASES, ids="-".join)
def case(request, model):
    """Return (reference arrays, image, label features (K, E), background features (M, E), settings)."""
    data, name = request.param
    benchmark, prefix = DATA_SETS[data], f"{data}/{name}/"
    reference = {key.removeprefix(prefix): value for key, value in VECTORS.items() if key.startswith(prefix)}
    names = [benchmark.prompts[key] for key in reference["keys"]]
    text = clip.text_features(model, names, benchmark.templates)
    backgrounds = clip.text_features(model, benchmark.backgrounds, benchmark.templates)
    settings = CamSettings(box_threshold=benchmark.box_threshold, exclude_last_layer=data == "voc")
    return reference, parity_image(name, SIZES[name]), text, backgrounds, settings


def difference(computed, reference: np.ndarray) -> float:
    """Return the largest absolute difference."""
    assert computed.shape == reference.shape
    return np.abs(np.asarray(computed, np.float64) - reference.astype(np.float64)).max()


@pytest.mark.parametrize("data", DATA_SETS)
def test_text_features_match_golden(data, model):
    benchmark = DATA_SETS[data]
    names = [*benchmark.prompts, *benchmark.backgrounds]
    assert difference(clip.text_features(model, names, benchmark.templates), VECTORS[f"{data}/text"]) <= 1e-5


def test_stages_match_golden(case, model):
    reference, image, text, backgrounds, settings = case
    images = clip.preprocess(image, clip.target_size(*image.size[::-1], model.visual.patch_size))[None]
    result = text_cams(model, images, text[None], backgrounds, exclude_last_layer=settings.exclude_last_layer)
    assert difference(result.cams[0], reference["cam"]) <= 1e-4
    masks = box_masks(result.cams, settings.box_threshold)
    np.testing.assert_array_equal(masks[0], reference["boxes"])
    refined = refine(result.cams, result.affinity, masks)
    assert difference(refined[0], reference["refined"]) <= 1e-4


def test_stored_cams_match_golden_and_need_exclude_last_layer(case, model, tmp_path):
    reference, image, text, backgrounds, settings = case

    def stored(settings):
        maps = image_cams(model, image, text, backgrounds, settings)
        write_cams(tmp_path, "image", reference["keys"], maps, image.size[::-1])
        return camfile.read(tmp_path, "image", REFINED)[1]

    assert difference(stored(settings), reference["attn_highres"]) <= 2e-3
    other = replace(settings, exclude_last_layer=not settings.exclude_last_layer)
    if reference["attn_highres"].any():  # one image's CAM is all zero
        assert difference(stored(other), reference["attn_highres"]) > 2e-3


@pytest.mark.parametrize("data", DATA_SETS)
def test_preset_cls_seg_with_label_file_matches_golden(data, tmp_path, monkeypatch, parity_file):
    benchmark, names = DATA_SETS[data], [name for other, name in CASES if other == data]
    lines = []
    for name in names:
        parity_image(name, SIZES[name]).save(tmp_path / f"{name}.png")
        lines.append(" ".join(map(str, [name, *VECTORS[f"{data}/{name}/keys"]])))
    (tmp_path / "tags.txt").write_text("\n".join(lines))
    command = ["generate_cams", "--benchmark", benchmark.name, "--img_root", tmp_path]
    command += ["--cam_out_dir", tmp_path / "cams", "--preset", "cls_seg"]
    command += ["--split_file", tmp_path / "tags.txt", "--labels", tmp_path / "tags.txt"]
    command += ["--model", parity_file("tiny", 0), "--round_weights", "off", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", [*map(str, command)])
    assert main() == 0
    for name in names:
        made = np.load(tmp_path / "cams" / f"{name}.npy", allow_pickle=True).item()  # as other projects do
        np.testing.assert_array_equal(made["keys"], VECTORS[f"{data}/{name}/keys"])
        reference = VECTORS[f"{data}/{name}/attn_highres"]
        assert made[REFINED].dtype == reference.dtype == np.float16
        assert difference(made[REFINED], reference) <= 2e-3
