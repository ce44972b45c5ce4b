"""From encoded JPEGs to written pseudo masks."""

import statistics
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from bench import cams, crf, measure
from bench.cams import BENCHMARK, Material
from bench.measure import Setting
from bench.reference import reference_mask
from pipeline.fused import FusedStep
from pipeline.masks import MaskSettings
from pipeline.processes import Outcome
from pipeline.step import run_step
from segmentation.masks import read_mask, write_mask


def ours(setting: Setting, material: Material, names: list[str], output: Path) -> Iterator[Outcome]:
    """Run our fused steps 1 and 2b, which write only masks."""
    masks = MaskSettings(crf_backend=setting.backend).on(setting.kind)
    return run_step(names, 0, FusedStep(material.step(setting, None), masks, str(output)))


def reference(setting: Setting, material: Material, names: list[str], output: Path) -> Iterator[Outcome]:
    """Run the reference, which writes full-size CAM files between the two steps."""
    output.mkdir(exist_ok=True)
    between = material.folder / f"{output.name}_cams"
    for outcome in cams.reference(setting, material, names, between):
        mask = reference_mask(material.image(outcome.name), between / f"{outcome.name}.npy")
        Image.fromarray(mask).save(output / f"{outcome.name}.png")
        yield outcome


def run(setting: Setting) -> dict:
    """Measure; see `bench.measure.COMMON` for the results that every subcommand returns.

    "ceiling_share" counts only the network, whose minimum of computation is by far the largest.
    """
    setting.limit_threads()
    with measure.scratch() as folder:
        material = Material.make(folder, setting)
        result, done, ceiling = cams.race(setting, material, ours, reference)
        result["label_agreement"] = statistics.mean(_agreement(folder, name) for name in done)
        network = material.load(setting.device, setting.precision)
        result |= cams.network_share(setting, network[0], result["images_per_s"], ceiling)
        result["stages"] = cams.stages(setting, material, network, ceiling)
        task = crf.to_device(setting, crf.draw(setting, crf.AT_ONCE[setting.kind]))
        result["stages"] += crf.stages(setting, task)
        result["stages"].append(_writing(folder, read_mask(folder / "ours0" / f"{done[0]}.png")))
    return result


def _writing(folder: Path, mask: np.ndarray) -> dict:
    """Return the stage of writing a mask."""
    taken = measure.seconds(lambda: write_mask(folder / "stage.png", mask, BENCHMARK.palette))
    return measure.stage("write the mask", taken, mask.nbytes / 1e9, "GB/s", measure.copy_rate("cpu") / 1e9)


def _agreement(folder: Path, name: str) -> float:
    """Return the fraction of pixels with equal values in both masks; 255 counts as a value."""
    masks = (read_mask(folder / version / f"{name}.png") for version in ("ours0", "reference"))
    return float(np.equal(*masks).mean())
