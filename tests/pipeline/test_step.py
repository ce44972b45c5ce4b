"""The step runner, records of earlier versions, warnings about precision, and custom affinities."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import voc12
from pipeline import compute
from pipeline.cams import INITIAL, REFINED, CamSettings, CamStep, image_cams
from pipeline.cams_cli import OUTPUTS
from pipeline.compute import ComputeSettings, has_bf16_units, warn_of_slow_precision
from pipeline.flow import FlowSettings
from pipeline.processes import Outcome, drain
from pipeline.run import RENAMED, Record, Run, fingerprint, read_settings
from pipeline.step import Decoded, Step, run_step
from pytorch_grad_cam.methods import min_max_normalize
from segmentation import camfile, labels
from tests.clip.test_checkpoint import SMALL_RESNET, small_state
from tests.conftest import parity_image
from tests.pipeline.conftest import write_voc
from tests.processes import here


class Letters(Step):
    """Records names in capitals. Names in `done` are done; "x" interrupts the step."""

    def __init__(self, done: str = "", prefetch: int = 1):
        self.done, self.flow = done, FlowSettings(threads=0, prefetch=prefetch)
        self.calls: list[str] = []

    def is_done(self, name: str) -> bool:
        return name in self.done

    def start(self, worker_index: int) -> None:
        self.calls.append(f"start {worker_index}")

    def decode(self, name: str) -> Decoded | Outcome:
        if name == "x":
            raise KeyboardInterrupt
        return Outcome(name, notes=("skipped",)) if name == "s" else Decoded(name, notes=["decoded"])

    def compute(self, batch: list[Decoded]) -> list[str]:
        return [decoded.name.upper() for decoded in batch]

    def write(self, decoded: Decoded, result: str) -> list[str]:
        self.calls.append(f"write {result}")
        return decoded.notes

    def finish(self) -> list[str]:
        self.calls.append("finish")
        return self.calls


def run_to_end(step: Step, names: str, worker_index: int = 0) -> tuple[list[Outcome], list[str]]:
    """Run a step; return the outcomes in the order of names, and the result of `finish`."""
    outcomes: list[Outcome] = []
    result = drain(run_step(list(names), worker_index, step), outcomes.append)
    return sorted(outcomes), result


def test_done_images_are_counted_and_the_others_processed():
    outcomes, calls = run_to_end(Letters(done="bd"), "abscd", worker_index=3)
    notes = {outcome.name: outcome.notes for outcome in outcomes}
    assert notes == {"a": ("decoded",), "b": (), "c": ("decoded",), "d": (), "s": ("skipped",)}
    assert not any(outcome.failure for outcome in outcomes)
    assert calls == ["start 3", "write A", "write C", "finish"]


def test_a_step_with_nothing_to_do_is_not_started():
    for names, count in (("ab", 2), ("", 0)):
        outcomes, calls = run_to_end(Letters(done="ab"), names)
        assert outcomes == [Outcome(name) for name in names] and len(outcomes) == count
        assert calls == ["finish"]


def test_done_outcomes_replace_the_outcome_of_the_name():
    class Several(Letters):
        several = True

        def done_outcomes(self, name):
            return [Outcome(f"{name}1"), Outcome(f"{name}2", "it failed before")]

    run = Run(None)
    run.map(Several(done="a"), ["a", "b"])
    assert run.done == 3 and run.failures == [("a2", "it failed before")]


def test_finish_is_also_called_after_an_error():
    step = Letters()
    with pytest.raises(KeyboardInterrupt):
        run_to_end(step, "abx")
    assert step.calls[0] == "start 0" and step.calls[-1] == "finish" and "write A" in step.calls

    class Broken(Letters):
        def start(self, worker_index):
            raise FileNotFoundError("model x.pt does not exist")

    step = Broken()
    with pytest.raises(FileNotFoundError, match=r"x\.pt"):
        run_to_end(step, "ab")
    assert step.calls == ["finish"]


@pytest.mark.parametrize("num_workers, parts", [(1, ["abcdef"]), (2, ["abef", "cd"])])
def test_run_divides_names_in_blocks_and_returns_the_result_of_each_process(num_workers, parts):
    run = Run(None)
    results = run.map(Letters(prefetch=2), list("abcdef"), num_workers)
    written = ["".join(call[-1].lower() for call in calls if call.startswith("write")) for calls in results]
    assert written == parts and run.finish() == 0 and run.notes["decoded"] == (6, list("abcdef"))
    assert [calls[0] for calls in results] == [f"start {index}" for index in range(num_workers)]


# Records of earlier versions

FIRST_NAMES = {present: first for first, present in RENAMED.items()}


def as_first_recorded(folder: Path) -> dict:
    """Rewrite a folder's record with the setting names of the first version; return the record."""
    record = json.loads((folder / "settings.json").read_text())
    record["settings"] = {FIRST_NAMES.get(key, key): value for key, value in record["settings"].items()}
    record.pop("info", None)
    (folder / "settings.json").write_text(json.dumps(record))
    return record


def test_folders_of_earlier_versions_are_continued(voc, tmp_path, parity_file):
    """CAMs and masks whose records contain the setting names of the first version."""
    images = ["--img_root", voc / "JPEGImages", "--split_file", voc / "split.txt", "--device", "cpu"]
    cams, masks = tmp_path / "cams", tmp_path / "masks"
    first = ["generate_cams_voc12.py", *images, "--model", parity_file("tiny", 1), "--cam_out_dir", cams]
    second = ["eval_cam_with_crf.py", "--cam_out_dir", cams, *images[:4], "--num_workers", 1]
    second += ["--pseudo_mask_save_path", masks]
    for command in (first, second):
        assert here(*command)[0] == 0
    old = as_first_recorded(cams)
    assert {"averaged", "leave_out_last", "cover_edge", "method", "scales"} <= old["settings"].keys()
    assert not {"affinity_layers", "exclude_last_layer", "cam_scales"} & old["settings"].keys()
    before = {file: file.stat().st_mtime_ns for file in (*cams.glob("*.npy"), *masks.glob("*.png"))}
    assert len(before) == 6
    (cams / "other.npy").unlink()
    (masks / "other.png").unlink()
    for command in (first, second):
        code, _, errors = here(*command)
        assert code == 0, errors
    after = {file: file.stat().st_mtime_ns for file in before}
    assert {file.stem for file in before if before[file] != after[file]} == {"other"}
    as_first_recorded(cams)
    code, _, errors = here(*first, "--averaged_blocks", "3")
    assert code == 2 and "affinity_layers (was 8, now 3)" in errors


def test_records_are_the_same_under_old_and_new_names(tmp_path):
    settings = {"benchmark": "voc12", "refine": "caa", **CamSettings(cam_scales=(0.5, 1.0)).record()}
    record = Record("cams", settings, {"model": "abc"}, OUTPUTS)
    Run(tmp_path / "new", record)
    Run(tmp_path / "old", record)
    old = as_first_recorded(tmp_path / "old")
    new = read_settings(tmp_path / "new")
    assert read_settings(tmp_path / "old")["settings"] == new["settings"]
    assert new["settings"]["cam_scales"] == [0.5, 1.0] and new["settings"]["affinity_layers"] == 8
    # The digest equals the one that mask folders of the first version recorded.
    assert fingerprint(old) == fingerprint(new) == fingerprint(vars(record)) == fingerprint(
        {"settings": {"cam_format": "compact", **new["settings"]}, "inputs": {"model": "abc"}}
    )
    for changed in ({"affinity_layers": 3}, {"cam_scales": [1.0]}):
        assert fingerprint({**new, "settings": {**new["settings"], **changed}}) != fingerprint(new)


def test_the_digest_of_a_record_is_that_of_the_first_version():
    settings = {"averaged": 8, "leave_out_last": False, "method": "gradcam", "cam_format": "full"}
    record = {"step": "cams", "settings": settings, "inputs": {"model": "abc"}}
    digest = "3a95bc1158a5672e867d695c2b404098e4d9d36f092908df2609d2e4816daee0"
    assert fingerprint(record) == digest
    renamed = {RENAMED.get(key, key): value for key, value in settings.items()}
    assert fingerprint({**record, "settings": renamed}) == digest
    assert fingerprint({}) == ""


# Precision

X86 = "processor : 0\nmodel name : any\nflags : fpu sse2 avx2 {}\nbugs : amx_bf16\n"
ARM = "processor : 0\nFeatures : fp asimd {}\n"


@pytest.mark.parametrize("text", [X86, ARM])
@pytest.mark.parametrize("flag, expected", [("", False), ("avx512f", False), ("avx512_bf16", True),
                                            ("amx_bf16", True), ("bf16", True)])  # fmt: skip
def test_cpus_with_bfloat16_units(text, flag, expected, tmp_path):
    (tmp_path / "cpuinfo").write_text(text.format(flag))
    assert has_bf16_units(tmp_path / "cpuinfo") is expected


def test_unknown_cpus_count_as_having_bfloat16_units(tmp_path):
    assert has_bf16_units(tmp_path / "nowhere")
    (tmp_path / "cpuinfo").write_text("processor : 0\nmodel name : any\n")
    assert has_bf16_units(tmp_path / "cpuinfo")


@pytest.mark.parametrize(
    "device, precision, units, warns",
    [
        ("cpu", "bf16", False, True),
        ("cpu", "bf16", True, False),
        ("cpu", "fp32", False, False),
        ("cuda:0", "bf16", False, False),
    ],
)
def test_emulated_bfloat16_prints_a_warning(device, precision, units, warns, monkeypatch, capsys):
    monkeypatch.setattr(compute, "has_bf16_units", lambda: units)
    warn_of_slow_precision(device, precision)
    errors = capsys.readouterr().err
    assert ("warning: this CPU has no bfloat16 units" in errors and "--precision bf16" in errors) is warns
    assert warns or not errors


def test_only_the_first_process_warns(monkeypatch, capsys, parity_file):
    monkeypatch.setattr(compute, "has_bf16_units", lambda: False)
    settings = ComputeSettings(device="cpu", precision="bf16")
    for worker_index, count in ((1, 0), (0, 1)):
        settings.load(str(parity_file("tiny", 1)), None, worker_index)
        assert capsys.readouterr().err.count("warning") == count


# Custom affinities


def identity(images: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H', W') -> (B, n, n): each patch is related only to itself."""
    patches = images.shape[2] * images.shape[3] // 16**2
    return torch.eye(patches).repeat(len(images), 1, 1)


def normalized(cams: np.ndarray) -> np.ndarray:
    return min_max_normalize(torch.from_numpy(cams)).numpy()


def step_of(voc: Path, output: Path, model: Path, **changes) -> CamStep:
    names = (voc / "split.txt").read_text().split()
    benchmark = replace(voc12.BENCHMARK, root=str(voc))
    return CamStep(
        benchmark=benchmark,
        image_root=str(voc / "JPEGImages"),
        labels=labels.reader(benchmark, {name: [] for name in names}, None),
        model=str(model),
        output=str(output),
        format="compact",
        compute_settings=ComputeSettings(device="cpu"),
        **changes,
    )


def test_an_identity_affinity_leaves_the_initial_cams(parity_clip):
    model = parity_clip("tiny", 1)
    assert model.visual.patch_size == 16
    features = torch.nn.functional.normalize(torch.randn(9, 64, generator=torch.manual_seed(0)), dim=-1)
    image = parity_image("es_a", (96, 128))

    def cams(affinity=None, **options):
        settings = CamSettings(keep_initial=True, **options)
        return image_cams(model, image, features[:3], features[3:], settings, affinity)

    own, attention = cams(identity, refine="mhsa"), cams(refine="mhsa")
    np.testing.assert_allclose(own[INITIAL], attention[INITIAL], atol=1e-4)  # other kernels
    initial = normalized(own[INITIAL])  # refined CAMs are normalized too; a faint class has a low maximum
    np.testing.assert_allclose(own[REFINED], initial, atol=1e-5)
    assert np.abs(attention[REFINED] - normalized(attention[INITIAL])).max() > 0.1
    # Boxes then only mask the initial CAM; values inside are unchanged.
    boxed = cams(identity, refine="caa", include_edge=True)[REFINED]
    kept = boxed > 0
    assert kept.any((1, 2)).all() and (initial[~kept] > 0).any()
    np.testing.assert_allclose(boxed[kept], initial[kept], atol=1e-5)
    flipped = cams(identity, refine="mhsa", flip=True)  # in a batch with the mirrored image
    assert initial[0].max() > 0.99 and own[INITIAL][0].max() > 0.99  # the class is not faint
    np.testing.assert_allclose(flipped[REFINED][0], flipped[INITIAL][0], atol=1e-4)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_step_1_uses_a_custom_affinity(num_workers, tmp_path, parity_file):
    voc = write_voc(tmp_path / "voc", {"es_a": ((96, 128), [8, 1, 5]), "es_b": ((75, 100), [3])})
    settings = CamSettings(refine="mhsa", keep_initial=True)
    model = parity_file("tiny", 1)
    own = step_of(voc, tmp_path / "own", model, settings=settings, affinity=identity)
    attention = step_of(voc, tmp_path / "attention", model, settings=settings)
    for step, workers in ((own, num_workers), (attention, 1)):
        run = Run(step.output, Record("cams", outputs=OUTPUTS))
        run.map(step, ["es_a", "es_b"], workers)
        assert run.finish() == 0
    for name in ("es_a", "es_b"):
        initial, refined = (camfile.read(tmp_path / "own", name, kind)[1] for kind in (INITIAL, REFINED))
        np.testing.assert_allclose(refined, initial, atol=1e-3)  # float16
        np.testing.assert_allclose(initial, camfile.read(tmp_path / "attention", name, INITIAL)[1], atol=1e-3)
        assert np.abs(camfile.read(tmp_path / "attention", name)[1].astype(float) - refined).max() > 0.1


def test_a_resnet_tower_accepts_a_custom_affinity(tmp_path):
    """The tower itself has no attention between patches."""
    voc = write_voc(tmp_path / "voc", {"es_a": ((96, 128), [8, 1, 5])})
    torch.save(small_state(SMALL_RESNET), tmp_path / "rn.pt")

    def affinity(images):
        cells = -(-images.shape[2] // 32) * -(-images.shape[3] // 32)
        return torch.eye(cells).repeat(len(images), 1, 1)

    settings = CamSettings(refine="mhsa", keep_initial=True)
    step = step_of(voc, tmp_path / "cams", tmp_path / "rn.pt", settings=settings, affinity=affinity)
    outcomes, _ = run_to_end(step, ["es_a"])
    assert [outcome.failure for outcome in outcomes] == [""]
    initial, refined = (camfile.read(tmp_path / "cams", "es_a", kind)[1] for kind in (INITIAL, REFINED))
    np.testing.assert_allclose(refined, initial, atol=1e-3)
    assert initial.shape == (3, 96, 128) and initial.max() > 0.9
    with pytest.raises(ValueError, match="--refine none"):
        replace(step, affinity=None).start(0)


def test_a_copy_of_a_step_with_another_output_writes_there(voc, tmp_path, parity_file):
    step = replace(step_of(voc, tmp_path / "first", parity_file("tiny", 1)), output=str(tmp_path / "second"))
    run_to_end(step, ["es_b"])
    assert camfile.find(tmp_path / "second", "es_b") and not (tmp_path / "first").exists()
