"""The flags of the reference scripts and of earlier versions give the same results as the present flags."""

import json
from pathlib import Path

import numpy as np
import pytest

import voc12
from segmentation.masks import write_mask
from tests.conftest import parity_image
from tests.processes import here

CAMS_BY_OLD_FLAGS = ["--averaged_blocks", 3, "--leave_out_last", "--cover_edge", "--look_ahead", 4]
CAMS = ["--affinity_layers", 3, "--exclude_last_layer", "--include_edge", "--prefetch", 4]


def files(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder, and the step, settings and inputs of its record."""
    content = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    record = json.loads(content.pop("settings.json"))
    return {**content, "record": (record["step"], record["settings"], record["inputs"])}


def made(out: Path, *command) -> dict[str, bytes]:
    """Run a script and return the files that it writes to `out`."""
    code, _, errors = here(*command)
    assert code == 0 and "Traceback" not in errors, errors
    content = files(out)
    assert len(content) > 1
    return content


@pytest.fixture
def old(voc) -> list:
    return ["--img_root", voc / "JPEGImages", "--split_file", voc / "split.txt", "--device", "cpu"]


@pytest.fixture
def new(voc) -> list:
    return ["--image_root", voc / "JPEGImages", "--split_file", voc / "split.txt", "--device", "cpu"]


@pytest.mark.parametrize(
    "script, old_name, new_name",
    [
        ("generate_cams_voc12.py", [], []),
        ("generate_cams_coco14.py", [], []),
        ("generate_cams.py", ["--dataset", "voc12"], ["--benchmark", "voc12"]),
    ],
)
def test_step_1_accepts_old_flags(script, old_name, new_name, voc, old, new, tmp_path, parity_file):
    (voc / "split.txt").write_text("es_a 8 1 5\nes_b 3\nother 19\n")
    rest = ["--model", parity_file("tiny", 1), "--cam_format", "compact"]
    before, now = tmp_path / "old", tmp_path / "new"
    with_old = made(before, script, *old_name, *old, *rest, *CAMS_BY_OLD_FLAGS, "--cam_out_dir", before)
    with_new = made(now, script, *new_name, *new, *rest, *CAMS, "--output", now)
    assert with_old == with_new
    plain = tmp_path / "plain"
    flags = ["--no-leave_out_last", "--cam_out_dir", plain]
    assert made(plain, script, *old_name, *old, *rest, *flags)["es_a.npz"] != with_old["es_a.npz"]


def test_pseudo_masks_accepts_old_flags(voc, old, new, tmp_path, parity_file):
    rest = ["--model", parity_file("tiny", 1), "--keep_cams", "compact", "--preset", "cls_seg"]
    masks = {name: tmp_path / f"{name}_masks" for name in ("old", "new")}
    cams = {name: tmp_path / f"{name}_cams" for name in ("old", "new")}
    folders = ["--pseudo_mask_save_path", masks["old"], "--cam_out_dir", cams["old"]]
    flags = ["--dataset", "voc12", *old, *CAMS_BY_OLD_FLAGS, "--no-leave_out_last", *folders]
    with_old = made(masks["old"], "pseudo_masks.py", *rest, *flags)
    folders = ["--output", masks["new"], "--cam_dir", cams["new"]]
    flags = ["--benchmark", "voc12", *new, *CAMS, "--no_exclude_last_layer", *folders]
    assert made(masks["new"], "pseudo_masks.py", *rest, *flags) == with_old
    assert files(cams["old"]) == files(cams["new"])


def test_step_2_accepts_old_flags(voc, old, new, tmp_path, parity_file):
    """Masks from CAMs, and the scores of both."""
    cams, before, now = tmp_path / "cams", tmp_path / "old", tmp_path / "new"
    made(cams, "generate_cams_voc12.py", *old, "--model", parity_file("tiny", 1), "--cam_out_dir", cams)
    crf = ["eval_cam_with_crf.py", "--confidence", "0.5", "--num_workers", 1]
    flags = ["--dataset", "voc12", *old, "--cam_out_dir", cams, "--pseudo_mask_save_path", before]
    with_old = made(before, *crf, *flags, "--cam_eval_thres", 2)
    flags = ["--benchmark", "voc12", *new, "--cam_dir", cams, "--output", now]
    assert made(now, *crf, *flags) == with_old
    for name, size in (("es_a", (96, 128)), ("es_b", (75, 100)), ("other", (130, 90))):
        truth = np.array(parity_image(name, size).convert("L")) % 21
        write_mask(tmp_path / "truth" / f"{name}.png", truth, voc12.BENCHMARK.palette)
    evaluation = ["eval_cam.py", *old[2:4], "--gt_root", tmp_path / "truth", "--json"]
    for old_folder, new_folder, kind in ((cams, cams, "attn_highres"), (before, now, "png")):
        flags = ["--cam_out_dir", old_folder, "--dataset", "voc12", "--cam_type", kind]
        first, second = tmp_path / "old.json", tmp_path / "new.json"
        assert here(*evaluation, first, *flags)[0] == 0
        flags = ["--cam_dir", new_folder, "--benchmark", "voc12", "--cam_type", kind]
        assert here(*evaluation, second, *flags)[0] == 0
        assert first.read_bytes() == second.read_bytes()
        assert json.loads(first.read_text())["images"] == 3


def test_step_0_accepts_old_flags(voc, old, new, tmp_path, parity_file):
    before, now = tmp_path / "old", tmp_path / "new"
    model = parity_file("tiny", 1)
    flags = ["--dataset", "voc12", *old, "--model_path", model, "--look_ahead", 4, "--cover_edge"]
    with_old = made(before, "classify.py", *flags, "--output", before, "--save_file", tmp_path / "old.txt")
    flags = ["--benchmark", "voc12", *new, "--model", model, "--prefetch", 4, "--include_edge"]
    with_new = made(now, "classify.py", *flags, "--output", now, "--save_file", tmp_path / "new.txt")
    assert with_old == with_new and "labels.txt" in with_old
    assert (tmp_path / "old.txt").read_bytes() == (tmp_path / "new.txt").read_bytes()
