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
AT_ONCE = {"cpu": 1, "cuda": 16}  # images
REFERENCE_IMAGES = 8  # at most in a round
LATTICE_BYTES = 8 * (3 + 6)  # of a pixel: index and weight of 3 corners of the one lattice, 6 of the other
PASSES = 4  # of an iteration over the posterior: read by both kernels, energies read, posterior written

Task = tuple[list[np.ndarray], list[np.ndarray]]  # images (H, W, 3) uint8, probabilities (1 + K, H, W)


def draw(setting: Setting, count: int) -> Task:
    """Images, and CAMs with a background in front."""
    random = np.random.default_rng(0)
    images, probabilities = [], []
    for index in range(count):
        labels = len(data.labels_of(index, setting.labels))
        maps = resize(data.random_cams(random, labels), (data.HEIGHT, data.WIDTH)).astype(np.float16)
        images.append(np.asarray(Image.open(io.BytesIO(data.scene(random)))))
        probabilities.append(np.concatenate([1 - maps.max(0, keepdims=True), maps]))
    return images, probabilities


def posteriors(setting: Setting, task: Task, preset: Preset = PRESET) -> Iterator[np.ndarray | torch.Tensor]:
    """This project's way: (1 + K, H, W) float32 each. On a GPU everything lies there already."""
    step = AT_ONCE[setting.kind]
    for start in range(0, len(task[0]), step):
        images, probabilities = (items[start : start + step] for items in task)
        yield from densecrf_batch(images, probabilities, preset, setting.backend)


def placed(setting: Setting, task: Task) -> Task:
    """The task where it is computed: arrays on a CPU, tensors on a GPU."""
    if setting.kind == "cpu":
        return task
    return tuple([torch.from_numpy(array).to(setting.device) for array in arrays] for arrays in task)


def watched(setting: Setting, count: int) -> Iterator[Outcome]:
    """`posteriors` of drawn images, for their memory to be watched."""
    for _ in posteriors(setting, placed(setting, draw(setting, count))):
        yield Outcome("")


def run(setting: Setting) -> dict:
    """Measure; see `bench.measure.COMMON` for the figures that every subcommand returns.

    "largest_difference" is that of any posterior.
    """
    setting.limit_threads()
    public = replace(setting, device="cpu", backend="pydensecrf")
    drawn = draw(setting, setting.images)
    task = placed(setting, drawn)
    few: Task = tuple(items[:REFERENCE_IMAGES] for items in drawn)
    warm: Task = tuple(items[: AT_ONCE[setting.kind]] for items in task)
    list(posteriors(setting, warm))  # compiles what is compiled
    found = {}

    def ours_in(number: int) -> float:
        measure.synchronise(setting.kind)
        start = time.perf_counter()
        found["ours"] = list(posteriors(setting, task))
        measure.synchronise(setting.kind)
        return (time.perf_counter() - start) / setting.images

    def reference_in(number: int) -> float:
        start = time.perf_counter()
        found["reference"] = list(posteriors(public, few))
        return (time.perf_counter() - start) / len(few[0])

    taken = measure.take_turns({"ours": ours_in, "reference": reference_in}, setting.rounds)
    result = measure.compared(taken["ours"], taken["reference"])
    ours = [torch.as_tensor(posterior).cpu().numpy() for posterior in found["ours"][: len(few[0])]]
    pairs = list(zip(ours, found["reference"], strict=True))
    result["label_agreement"] = float(np.mean([(a.argmax(0) == b.argmax(0)).mean() for a, b in pairs]))
    result["largest_difference"] = float(max(np.abs(a - b).max() for a, b in pairs))
    count = 1 + AT_ONCE[setting.kind]
    for prefix, way in (("", setting), ("reference_", public)):
        peak = measure.peak_memory(watched, way, count)
        result |= {f"{prefix}peak_{key}": value for key, value in peak.items()}
    result["stages"] = stages(setting, warm)
    whole = result["stages"][-1]
    moved = whole["seconds"] * whole["rate"]  # GB
    result["ceiling_share"] = moved * result["images_per_s"] / (measure.copy_rate(setting.kind) / 1e9)
    return result


def stages(setting: Setting, task: Task) -> list[dict]:
    """Time building the lattices, and that with the iterations; bytes are what they must move at the least.

    The difference is not told: of two times that are measured apart, it can be below 0.
    """
    kind, count = setting.kind, len(task[0])
    copied = measure.copy_rate(kind) / 1e9
    channels = sum(len(maps) for maps in task[1]) / count
    pixels = data.HEIGHT * data.WIDTH
    built = pixels * LATTICE_BYTES
    each = built + pixels * 4 * PASSES * channels  # the lattices are read again in every iteration

    def line(name: str, iterations: int) -> dict:
        preset = replace(PRESET, iterations=iterations)
        taken = measure.seconds(lambda: list(posteriors(setting, task, preset)), kind=kind) / count
        return measure.stage(name, taken, (built + iterations * each) / 1e9, "GB/s", copied)

    last = PRESET.iterations
    return [line("build the lattices", 0), line(f"build them, then {last} iterations", last)]
