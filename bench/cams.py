"""Step 1: seconds per image and per label, and peak memory, beside the public way of doing it.

Timed is what happens between a decoded image and its full-size float16 maps; loading the model and
encoding the text are left out. Both ways run in turn, image by image, so that a busy machine slows
both alike; ratios are worth more than seconds.
"""
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import clip
from bench.reference import reference_cams
from clip.model import CLIP, Config
from pipeline.cams import REFINED, CamSettings, image_cams
from segmentation.camfile import resize

VIT_B16 = Config(512, 224, 12, 768, 16, 77, 49408, 512, 12)
HEIGHT, WIDTH = 375, 500  # VOC's usual image
LABELS = (1, 2, 3)
MEANS = {"VOC12": 1.5, "COCO14": 2.9}  # labels per image
BACKGROUNDS = 25
BOX_THRESHOLD = 0.4
CLEAR_PEAK, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")  # Linux only


def run(model_name: str | None, device: str, precision: str, threads: int, repeats: int) -> dict:
    """Measure and return what is printed; see the module.

    Args:
        model_name: what `clip.load` takes, a ViT; None: random weights in the shape of ViT-B/16.
        repeats: timed images per number of labels; the medians are reported.
    """
    torch.set_num_threads(threads)
    model, image, text, backgrounds = _inputs(model_name, device, precision)
    ways = {"ours": _ours, "reference": _reference}
    if precision != "fp32" or model.device.type != "cpu":
        del ways["reference"]  # it is the public float32 CPU path
    seconds: dict[str, dict[int, list[float]]] = {way: {k: [] for k in LABELS} for way in ways}
    agreement = []
    for repeat in range(repeats + 1):  # the first round warms up
        for labels in LABELS:
            maps = {}
            for way, make in ways.items():
                start = time.perf_counter()
                maps[way] = make(model, image, text[:labels], backgrounds)
                if repeat:
                    seconds[way][labels].append(time.perf_counter() - start)
            if len(maps) == 2:
                agreement.append(np.abs(maps["ours"].astype(float) - maps["reference"]).max())
    result: dict = {"threads": threads, "precision": precision, "repeats": repeats}
    for way in ways:
        prefix = "" if way == "ours" else "reference_"
        medians = [statistics.median(seconds[way][labels]) for labels in LABELS]
        per_label, first = np.polyfit(LABELS, medians, 1)
        result[f"{prefix}seconds_without_labels"] = float(first)
        result[f"{prefix}seconds_per_label"] = float(per_label)
        result[f"{prefix}images_per_s"] = 1 / float(first + MEANS["VOC12"] * per_label)
        result[f"{prefix}peak_memory_mb"] = _peak_memory(way, model_name, device, precision, threads)
    if len(ways) == 2:
        result["largest_difference"] = float(max(agreement))
        for name, labels in MEANS.items():
            ours, public = (
                result[f"{prefix}seconds_without_labels"] + labels * result[f"{prefix}seconds_per_label"]
                for prefix in ("", "reference_")
            )
            result[f"speedup_{name}"] = public / ours
        result["speedup"] = result["speedup_VOC12"]
    return result


def _inputs(model_name: str | None, device: str, precision: str):
    torch.manual_seed(0)
    if model_name:
        model = clip.load(model_name, device, precision)
    else:
        model = CLIP(VIT_B16).eval().requires_grad_(False)
        model.visual_precision(clip.PRECISIONS[precision])
        model = model.to(clip.pick_device(device))
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (HEIGHT // 25, WIDTH // 25, 3), np.uint8)
    image = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    features = torch.randn(max(LABELS) + BACKGROUNDS, model.config.embed_dim, device=model.device)
    features = torch.nn.functional.normalize(features, dim=-1)
    return model, image, features[: max(LABELS)], features[max(LABELS) :]


def _ours(model, image, text, backgrounds) -> np.ndarray:
    maps = image_cams(model, image, text, backgrounds, CamSettings(box_threshold=BOX_THRESHOLD))
    return resize(maps[REFINED], (image.height, image.width)).astype(np.float16)


def _reference(model, image, text, backgrounds) -> np.ndarray:
    return reference_cams(model, image, text, backgrounds, BOX_THRESHOLD)


def _peak_memory(way: str, *setting) -> float:
    """Peak resident memory in MB, model included, of a process that does nothing else."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_measure_memory, (_ours if way == "ours" else _reference, *setting))


def _measure_memory(make: Callable, model_name, device, precision, threads) -> float:
    torch.set_num_threads(threads)
    model, image, text, backgrounds = _inputs(model_name, device, precision)
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        CLEAR_PEAK.write_text("5")  # forget the peak that building the model left
    make(model, image, text, backgrounds)
    if on_gpu:
        return torch.cuda.max_memory_allocated() / 2**20
    peak = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(peak.split()[1]) / 1024
