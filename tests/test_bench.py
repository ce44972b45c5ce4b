"""The benchmarks run and report their figures; their reference has the published results."""

import json
import os
import sys
import time

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import voc12
from bench import __main__ as command
from bench import cams, data, evaluation, measure, train
from bench.measure import COMMON, Setting
from bench.reference import read_cams, reference_cams, reference_evaluation, reference_mask, write_cams
from bench.reference_training import plain, reference_iteration, shrunk
from deeplab.config import OptimConfig
from deeplab.model import ConvBnReLU, build_v2, parameter_groups
from deeplab.recipe import sgd
from pipeline.evaluate import Evaluation
from pipeline.processes import Outcome, drain
from pipeline.step import run_step
from segmentation.config import RunConfig
from segmentation.dataset import Batch
from segmentation.masks import read_mask, write_mask
from segmentation.schedules import poly
from segmentation.transforms import resize_labels
from tests.conftest import CASES, golden, needs_pydensecrf, parity_image, relative
from tests.deeplab.common import fill_a, input_a, labels
from tests.deeplab.common import golden as deeplab_golden

MEGABYTES = 2**20


@pytest.fixture(autouse=True)
def _threads():
    """Restore the thread counts, which the benchmarks change."""
    ours, theirs = torch.get_num_threads(), cv2.getNumThreads()
    yield
    torch.set_num_threads(ours)
    cv2.setNumThreads(theirs)


@pytest.mark.parametrize("case", ["a", "c"])
def test_reference_cams_match_golden(case, parity_clip):
    name, size, preset, seed, _, labels = CASES[case]
    stored, model = golden(f"case_{case}"), parity_clip(preset, seed)
    text = torch.as_tensor(stored["text"])
    count = len(labels)
    maps = reference_cams(model, parity_image(name, size), text[:count], text[count:], 0.4)
    assert np.abs(maps.astype(float) - stored["attn_highres"].astype(float)).max() <= 1.5e-3
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_reference_evaluation_matches_golden(tmp_path):
    stored = golden("eval_cam")
    for index in range(5):
        write_cams(tmp_path / f"{index}.npy", stored[f"keys{index}"], stored[f"cams{index}"])
        write_mask(tmp_path / f"{index}.png", stored[f"gt{index}"], voc12.BENCHMARK.palette)
    hists = reference_evaluation(list("01234"), tmp_path, tmp_path, (1.0, 2.0, 3.0), 21)
    best = max((1, 2, 3), key=lambda exponent: stored[f"voc_thr{exponent}_miou"])
    for exponent, hist in zip((1, 2, 3, best), hists, strict=True):
        assert (hist == stored[f"voc_thr{exponent}_hist"]).all()


@needs_pydensecrf
def test_reference_masks_match_golden(tmp_path):
    arrays = golden("e2e")
    for case in "abcez":
        name, size, *_ = CASES[case]
        stored = golden(f"case_{case}")
        parity_image(name, size).save(tmp_path / "image.png")
        write_cams(tmp_path / "cams.npy", stored["keys"], stored["attn_highres"])
        mask = reference_mask(tmp_path / "image.png", tmp_path / "cams.npy")
        assert (mask == arrays[f"pseudo_{case}"]).mean() >= 0.999


def test_reference_training_matches_golden():
    torch.set_num_threads(1)  # faster for such a small network
    stored = deeplab_golden("a_train")
    model = fill_a(build_v2(5, (1, 1, 1, 1))).train()
    optimizer = sgd(parameter_groups(model), OptimConfig(learning_rate=2e-5))
    for step in range(3):
        batches = []
        for number in (2 * step, 2 * step + 1):
            images = torch.cat([input_a(f"dl:t{number}_{i}", 65, 65) for i in range(2)])
            batches.append(Batch(images.numpy(), labels(f"dl:tl{number}", (2, 65, 65), 5, block=8), []))
        loss = reference_iteration(plain(model), optimizer, batches, poly(step, 6, every=2))
        expected = stored["ce_losses"].reshape(3, 2, -1)[step].sum(axis=1).mean()
        assert loss == pytest.approx(expected, rel=1e-5)


def test_plain_network_equals_the_fused_one():
    torch.set_num_threads(1)  # faster for such a small network
    model = fill_a(build_v2(5, (1, 1, 1, 1))).train()
    images = input_a("dl:plain0", 65, 65)
    fused = model(images)  # gradients are recorded, so frozen batch norm is computed as scale and shift
    weights = [id(weight) for weight in model.parameters()]
    parts = plain(model)
    assert [id(weight) for weight in parts.parameters()] == weights
    assert all(weight.requires_grad for weight in parts.parameters())
    assert not any(isinstance(part, ConvBnReLU) for part in parts.modules())
    pairs = zip(parts(images), fused, strict=True)
    assert all(relative(plain_output.detach(), output.detach()) < 1e-5 for plain_output, output in pairs)


def test_reference_resizes_masks_like_ours():
    masks = np.random.default_rng(0).integers(0, 21, (2, 321, 321))
    assert torch.equal(shrunk(masks, (41, 31)), resize_labels(torch.from_numpy(masks), (41, 31)))


def bench(monkeypatch, capsys, tmp_path, *arguments) -> dict:
    file = tmp_path / "bench.json"
    monkeypatch.setattr(sys, "argv", ["bench", *map(str, arguments), "--json", str(file)])
    cache = os.environ.get(measure.CACHE)
    assert command.main() == 0
    assert os.environ.get(measure.CACHE) == cache
    result, table = json.loads(file.read_text()), capsys.readouterr().out
    for key in COMMON:
        assert isinstance(result[key], float) and result[key] > 0 and f"{key:34}" in table
    for line in result["stages"]:
        assert line["stage"] in table and line["seconds"] > 0 and line["share"] > 0
    return result


@pytest.fixture
def quick(monkeypatch):
    """Small inputs; starting the processes for the memory measurement takes most of the time."""
    for name, value in {"REPEATS": 1, "BRIEF": 0, "MATRIX": {"cpu": 256}, "COPIED": {"cpu": 2**20}}.items():
        monkeypatch.setattr(measure, name, value)
    monkeypatch.setattr(data, "HEIGHT", 90)
    monkeypatch.setattr(data, "WIDTH", 128)
    monkeypatch.setattr(cams, "WATCHED", {"cpu": 2})


def test_cams_reports_its_figures(quick, parity_file, tmp_path, monkeypatch, capsys):
    few = ("--images", 2, "--rounds", 1, "--model", parity_file("tiny", 0))
    result = bench(monkeypatch, capsys, tmp_path, "cams", *few)
    assert result["label_agreement"] >= 0.999
    blocks, width, patches = 10, 128, 6 * 8  # of the tiny model; 1.5 labels
    flop = blocks * (24 * (1 + patches) * width**2 + 4 * (1 + patches) ** 2 * width)
    flop += 1.5 * 2 * patches * (5 * width**2 + (1 + patches) * width)
    assert result["gflop_an_image"] == pytest.approx(flop / 1e9)
    share = result["gflop_per_s"] / result["matmul_gflop_per_s"]
    assert result["ceiling_share"] == pytest.approx(share)


@needs_pydensecrf
def test_crf_agrees_with_the_reference(quick, tmp_path, monkeypatch, capsys):
    result = bench(monkeypatch, capsys, tmp_path, "crf", "--images", 1, "--rounds", 1)
    assert result["label_agreement"] >= 0.999 and result["largest_difference"] <= 1e-3


@needs_pydensecrf
def test_pipeline_agrees_with_the_reference(quick, parity_file, tmp_path, monkeypatch, capsys):
    few = ("--images", 1, "--rounds", 1, "--model", parity_file("tiny", 0))
    result = bench(monkeypatch, capsys, tmp_path, "pipeline", *few)
    assert result["label_agreement"] >= 0.99


def test_eval_agrees_with_the_reference_in_constant_memory(quick, tmp_path, monkeypatch, capsys):
    result = bench(monkeypatch, capsys, tmp_path, "eval", "--images", 4, "--rounds", 1)
    assert result["label_agreement"] == 1
    grown = result["peak_memory_4n_mb"] / result["peak_memory_mb"]
    assert grown < 1.05


def test_train_reports_its_figures(quick, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "DRAWN", 2)
    few = ("--width", 4, "--crop", 33, "--rounds", 1, "--batch", 2, "--variants", "fp32+contiguous")
    result = bench(monkeypatch, capsys, tmp_path, "train", *few)
    assert result["images_an_iteration"] == 2
    figures = result["variants"]["fp32+contiguous"]
    assert figures == {key: result[key] for key in figures}
    assert figures["loss_difference"] < 1e-5 and figures["label_agreement"] >= 0.99
    stages = {line["stage"]: line for line in result["stages"]}
    assert {"reading, 4 threads", "optimizer fp32+contiguous"} < stages.keys()
    forward, backward = (stages[f"{name} fp32+contiguous"] for name in ("forward", "backward"))
    flop, ahead = (sum(line["seconds"] * line["rate"] for line in some) for some in
                   ((forward, backward), (forward,)))  # fmt: skip
    assert flop == pytest.approx(result["gflop_an_image"])
    assert 2.5 < flop / ahead < 3  # gradients of weights and of inputs, except of the image


def test_training_losses_agree_with_the_reference(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "DRAWN", 2)
    setting = Setting(width=4, crop=33, batch=1, accumulate=2)
    setting.limit_threads()
    task = train.Task.make(tmp_path, setting)
    batches, reference = task.batches(), train.Reference(setting, task)
    for _ in range(3):
        reference.iterate(batches)
    for variant, least, most in (("fp32", 0, 1e-5), ("bf16", 1e-6, 0.02)):
        trainer = task.trainer(setting, variant)
        for _ in range(3):
            trainer.iterate(batches)
        assert least <= train.difference(trainer.recent, reference.losses) <= most
        assert train.agreement(trainer.model, reference.model, batches) >= 0.98
    assert reference.losses[2] < reference.losses[0]


def test_variant_selects_precision_and_options():
    assert train.run_config("bf16") == RunConfig(precision="bf16")
    chosen = train.run_config("tf32+contiguous+compile")
    assert chosen == RunConfig(precision="tf32", channels_last=False, compile=True)
    for wrong in ("fp64", "fp32+fast", ""):
        with pytest.raises(ValueError, match="--variants"):
            train.run_config(wrong)


@pytest.mark.parametrize("slow", ["forward", "backward", "optimizer"])
def test_slow_stage_of_training_is_identified(slow, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "DRAWN", 2)
    setting = Setting(width=4, crop=17, batch=1, accumulate=2)
    setting.limit_threads()
    task = train.Task.make(tmp_path, setting)
    trainer = task.trainer(setting, "fp32")
    objective, batches = trainer.objective, task.batches()
    trainer.iterate(batches)  # warms up

    def slowed(*arguments):
        losses = objective(*arguments)
        if slow == "forward":
            time.sleep(0.5)
        if slow == "backward":
            next(iter(losses.values())).register_hook(lambda gradient: time.sleep(0.5))
        return losses

    trainer.objective = slowed
    if slow == "optimizer":
        trainer.optimizer.register_step_post_hook(lambda *_: time.sleep(0.5))  # before the hook of `timed`
    stages = train.timed("cpu", trainer, batches)
    assert max(stages, key=stages.get) == slow and trainer.objective is slowed
    assert stages[slow] >= (0.5 if slow == "optimizer" else 1)  # two batches


def test_wrong_setting_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"--crop, .* must be 1 or more, got 0, "):
        Setting(crop=0)
    with pytest.raises(ValueError, match=r"--images .* must be 1 or more, got 1, 0, 3"):
        Setting(images=0)
    with pytest.raises(ValueError, match="--images 3 must be a multiple of --threads 2"):
        cams.Material.make(tmp_path, Setting(images=3, threads=2))
    with pytest.raises(ValueError, match="--labels"):
        Setting(labels=0.5)


@pytest.mark.parametrize("mean", [1.0, 1.5, 2.9])
def test_images_have_the_mean_number_of_labels(mean, tmp_path):
    labels = [data.labels_of(index, mean) for index in range(100)]
    assert sum(map(len, labels)) == pytest.approx(100 * mean)
    assert all(len({*ids}) == len(ids) >= 1 for ids in labels)
    names = data.write_images(tmp_path, 2, mean)
    assert Image.open(tmp_path / "images" / f"{names[1]}.jpg").size == (500, 375)
    assert 50_000 < (tmp_path / "images" / f"{names[1]}.jpg").stat().st_size < 150_000  # like VOC's


def test_drawn_cams_agree_with_the_drawn_ground_truth(tmp_path):
    names = data.write_cams(tmp_path, 2, 2.0)
    places = [str(tmp_path / folder) for folder in ("full", "truth")]
    hists, _ = drain(run_step(names, 0, Evaluation(voc12.BENCHMARK, *places)), lambda outcome: None)
    assert np.trace(hists[0]) > hists[0].sum() / 2
    class_ids, maps = read_cams(tmp_path / "full" / f"{names[0]}.npy")
    assert class_ids.tolist() == data.labels_of(0, 2.0) and maps.shape == (2, 375, 500)
    assert 255 in read_mask(tmp_path / "truth" / f"{names[0]}.png")


def test_agreement_of_confusion_matrices():
    one, other = np.array([[5, 0], [1, 4]]), np.array([[4, 1], [1, 4]])
    assert evaluation._agreement([one], [one, one]) == 1
    assert evaluation._agreement([one, one], [one, other]) == 0.9


def test_steady_time_is_that_between_files(tmp_path):
    for index, second in enumerate((5.0, 1.0, 2.0, 2.5)):
        (tmp_path / str(index)).touch()
        os.utime(tmp_path / str(index), (second, second))
    assert measure.steady(tmp_path.iterdir(), 1) == pytest.approx(4 / 3)
    assert measure.steady(tmp_path.iterdir(), 2) == pytest.approx(3 / 2)


def test_rounds_alternate_and_medians_are_compared():
    called = []

    def way(name, seconds):
        def turn(number):
            called.append((number, name))
            return seconds[number]

        return turn

    taken = measure.take_turns({"a": way("a", [1, 2, 3]), "b": way("b", [2, 2, 9])}, 3)
    assert called == [(number, name) for number in range(3) for name in "ab"]
    assert measure.compared(taken["a"], taken["b"]) == {
        "images_per_s": 0.5, "reference_images_per_s": 0.5, "speedup": 2,
    }  # fmt: skip


def test_failed_image_is_an_error():
    with pytest.raises(ValueError, match="image b failed: no"):
        measure.check([Outcome("a"), Outcome("b", failure="no")])


def grow(setting, first, second):
    """Allocate `first` bytes before the first item, and `second` bytes before the second."""
    for size in (first, second):
        np.ones(size, np.uint8)
        yield Outcome("")


def test_peak_memory_starts_after_the_first_item():
    little = measure.peak_memory(grow, Setting(), 401 * MEGABYTES, MEGABYTES)["memory_mb"]
    much = measure.peak_memory(grow, Setting(), MEGABYTES, 401 * MEGABYTES)["memory_mb"]
    assert 380 < much - little < 420


def test_matmul_rate_is_plausible_and_stage_computes_the_share():
    start = time.perf_counter()
    rate = measure.matmul_rate("cpu", "fp32")
    assert rate > 1e9 and time.perf_counter() - start < 60
    assert measure.stage("s", 2.0, 6.0, "GB/s", 12.0) == {
        "stage": "s", "seconds": 2.0, "rate": 3.0, "unit": "GB/s", "share": 0.25,
    }  # fmt: skip
