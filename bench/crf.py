"""The dense CRF, from an image and its class probabilities to posteriors."""

import io
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from bench import data, measure
from bench.measure import Setting
from pipeline.processes import Outcome
from refinement.densecrf import PRESETS, Preset, densecrf_batch
from segmentation.camfile import resize

PRESET = PRESETS["clip_es"]
AT_ONCE = {"cpu": 1, "cuda": 16}  # images per batch
REFERENCE_IMAGES = 8  # maximum per round
LATTICE_BYTES = 8 * (3 + 6)  # per pixel: index and weight of 3 + 6 corners in the two lattices
# Passes over the posterior per iteration: reading two kernel outputs and the energies, writing the posterior.
PASSES = 4

Task = tuple[list[np.ndarray], list[np.ndarray]]  # images (H, W, 3) uint8, probabilities (1 + K, H, W)


def draw(setting: Setting, count: int) -> Task:
    """Return drawn images, and CAMs with a background channel first."""
    random = np.random.default_rng(0)
    images, probabilities = [], []
    for index in range(count):
        labels = len(data.labels_of(index, setting.labels))
        maps = resize(data.random_cams(random, labels), (data.HEIGHT, data.WIDTH)).astype(np.float16)
        images.append(np.asarray(Image.open(io.BytesIO(data.scene(random)))))
        probabilities.append(np.concatenate([1 - maps.max(0, keepdims=True), maps]))
    return images, probabilities


def posteriors(setting: Setting, task: Task, preset: Preset = PRESET) -> Iterator[np.ndarray | torch.Tensor]:
    """Yield our posteriors, (1 + K, H, W) float32 per image; with a GPU, inputs and outputs are on it."""
    step = AT_ONCE[setting.kind]
    for start in range(0, len(task[0]), step):
        images, probabilities = (items[start : start + step] for items in task)
        yield from densecrf_batch(images, probabilities, preset, setting.backend)


def to_device(setting: Setting, task: Task) -> Task:
    """Return the task on its device: arrays for a CPU, tensors for a GPU."""
    if setting.kind == "cpu":
        return task
    return tuple([torch.from_numpy(array).to(setting.device) for array in arrays] for arrays in task)


def watched(setting: Setting, count: int) -> Iterator[Outcome]:
    """Compute `posteriors` of drawn images, to measure the memory."""
    for _ in posteriors(setting, to_device(setting, draw(setting, count))):
        yield Outcome("")


def run(setting: Setting) -> dict:
    """Measure; see `bench.measure.COMMON` for the results that every subcommand returns.

    "largest_difference" is the largest absolute difference of posteriors.
    """
    setting.limit_threads()
    reference = replace(setting, device="cpu", backend="pydensecrf")
    drawn = draw(setting, setting.images)
    task = to_device(setting, drawn)
    few: Task = tuple(items[:REFERENCE_IMAGES] for items in drawn)
    warm: Task = tuple(items[: AT_ONCE[setting.kind]] for items in task)
    list(posteriors(setting, warm))  # compiles the CRF
    outputs = {}

    def ours_in(number: int) -> float:
        measure.synchronize(setting.kind)
        start = time.perf_counter()
        outputs["ours"] = list(posteriors(setting, task))
        measure.synchronize(setting.kind)
        return (time.perf_counter() - start) / setting.images

    def reference_in(number: int) -> float:
        start = time.perf_counter()
        outputs["reference"] = list(posteriors(reference, few))
        return (time.perf_counter() - start) / len(few[0])

    taken = measure.take_turns({"ours": ours_in, "reference": reference_in}, setting.rounds)
    result = measure.compared(taken["ours"], taken["reference"])
    ours = [torch.as_tensor(posterior).cpu().numpy() for posterior in outputs["ours"][: len(few[0])]]
    pairs = list(zip(ours, outputs["reference"], strict=True))
    result["label_agreement"] = float(np.mean([(a.argmax(0) == b.argmax(0)).mean() for a, b in pairs]))
    result["largest_difference"] = float(max(np.abs(a - b).max() for a, b in pairs))
    count = 1 + AT_ONCE[setting.kind]
    for prefix, version in (("", setting), ("reference_", reference)):
        peak = measure.peak_memory(watched, version, count)
        result |= {f"{prefix}peak_{key}": value for key, value in peak.items()}
    result["stages"] = stages(setting, warm)
    whole = result["stages"][-1]
    moved = whole["seconds"] * whole["rate"]  # GB
    result["ceiling_share"] = moved * result["images_per_s"] / (measure.copy_rate(setting.kind) / 1e9)
    return result


def stages(setting: Setting, task: Task) -> list[dict]:
    """Time building the lattices, with and without the iterations. Bytes are the minimum of memory traffic.

    The time of the iterations alone is not reported: it would be the difference of two measurements, which
    could be negative.
    """
    kind, count = setting.kind, len(task[0])
    copied = measure.copy_rate(kind) / 1e9
    channels = sum(len(maps) for maps in task[1]) / count
    pixels = data.HEIGHT * data.WIDTH
    built = pixels * LATTICE_BYTES
    each = built + pixels * 4 * PASSES * channels  # every iteration reads the lattices

    def line(name: str, iterations: int) -> dict:
        preset = replace(PRESET, iterations=iterations)
        taken = measure.seconds(lambda: list(posteriors(setting, task, preset)), kind=kind) / count
        return measure.stage(name, taken, (built + iterations * each) / 1e9, "GB/s", copied)

    last = PRESET.iterations
    return [line("build the lattices", 0), line(f"build them, then {last} iterations", last)]
