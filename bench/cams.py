"""Step 1, from encoded JPEGs to written CAM files."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import clip
import voc12
from bench import data, measure
from bench.measure import Setting
from bench.reference import read_cams, reference_cams, write_cams
from clip.model import CLIP, Config
from pipeline.cams import REFINED, CamSettings, CamStep, store_files
from pipeline.compute import MAX_BATCH, PREFETCHED_BATCHES
from pipeline.processes import Outcome
from pipeline.step import run_step
from pytorch_grad_cam.affinity import SINKHORN_ITERATIONS, box_masks, refine
from pytorch_grad_cam.grad_cam import encode, mean_gradients
from pytorch_grad_cam.methods import activation_map, min_max_normalize
from segmentation import camfile
from segmentation.images import read_image
from segmentation.labels import LabelReader, from_file

VIT_B16 = Config(512, 224, 12, 768, 16, 77, 49408, 512, 12)
BENCHMARK = voc12.BENCHMARK
PREFETCH = PREFETCHED_BATCHES * MAX_BATCH  # number of images that a GPU finishes at the same time
REFERENCE_IMAGES = 8  # maximum per round: on a GPU the reference is tens of times slower than our step
WATCHED = {"cpu": 8, "cuda": 3 * PREFETCH}  # images of our step while memory is measured
REFERENCE_WATCHED = 3  # images of the reference while memory is measured; it does not prefetch
STAGED = {"cpu": 1, "cuda": 16}  # batch size when stages are timed


@dataclass(frozen=True)
class Material:
    """Inputs of both versions.

    Attributes:
        folder: contains `images` and `labels.txt`; outputs go to folders in it.
        model: checkpoint file.
        names: image ids; the first ones are for the warm-up.
    """

    folder: Path
    model: str
    names: list[str]

    @classmethod
    def make(cls, folder: Path, setting: Setting) -> "Material":
        """Draw the images, and the weights if no model is given.

        Raises:
            ValueError: on a CPU, the number of images is not a multiple of the threads. Threads finish images
                together, so the time per image would be wrong.
        """
        if setting.kind == "cpu" and setting.images % setting.threads:
            raise ValueError(f"--images {setting.images} must be a multiple of --threads {setting.threads}")
        model = setting.model
        if model is None:
            torch.manual_seed(0)
            model = str(folder / "random.pt")
            torch.save(CLIP(VIT_B16).state_dict(), model)
        count = max(_warm(setting) + setting.images, WATCHED[setting.kind])
        return cls(folder, model, data.write_images(folder, count, setting.labels))

    def labels(self) -> LabelReader:
        return from_file(self.folder / "labels.txt", len(BENCHMARK.classes))

    def image(self, name: str) -> Path:
        return self.folder / "images" / f"{name}.jpg"

    def timed(self, setting: Setting) -> list[str]:
        """Return the images of a round, with those of the warm-up first."""
        return self.names[: _warm(setting) + setting.images]

    def step(self, setting: Setting, output: Path | None) -> CamStep:
        """Return our step, which writes compact CAM files; without `output` it writes none."""
        return CamStep(
            benchmark=BENCHMARK,
            image_root=str(self.folder / "images"),
            labels=self.labels(),
            model=self.model,
            output=str(output) if output else None,
            format="compact" if output else "none",
            settings=CamSettings(box_threshold=BENCHMARK.box_threshold),
            compute_settings=setting.compute,
        )

    def load(self, device: str, precision: str) -> tuple[CLIP, Tensor, Tensor]:
        """Return the model, and text features of the classes (20, E) and backgrounds (M, E)."""
        model = clip.load(self.model, device, precision)
        text = clip.text_features(model, BENCHMARK.prompts, BENCHMARK.templates)
        return model, text, clip.text_features(model, BENCHMARK.backgrounds, BENCHMARK.templates)


def _warm(setting: Setting) -> int:
    """Return the number of images before timing, which finish together: on a CPU one per thread."""
    return setting.threads if setting.kind == "cpu" else PREFETCH


# A version to compare (ours or reference): writes a file to `output` per name, and yields outcomes.
Version = Callable[[Setting, Material, list[str], Path], Iterator[Outcome]]


def ours(setting: Setting, material: Material, names: list[str], output: Path) -> Iterator[Outcome]:
    """Run our step 1."""
    return run_step(names, 0, material.step(setting, output))


def reference(setting: Setting, material: Material, names: list[str], output: Path) -> Iterator[Outcome]:
    """Run the reference in float32, with any `setting.precision`."""
    model, text, backgrounds = material.load(setting.device, "fp32")
    labels = material.labels()
    output.mkdir(exist_ok=True)
    for name in names:
        class_ids, image = labels(name), read_image(material.image(name))
        maps = reference_cams(model, image, text[class_ids], backgrounds, BENCHMARK.box_threshold)
        write_cams(output / f"{name}.npy", class_ids, maps)
        yield Outcome(name)


def run(setting: Setting) -> dict:
    """Measure; see `bench.measure.COMMON` for the results that every subcommand returns."""
    setting.limit_threads()
    with measure.scratch() as folder:
        material = Material.make(folder, setting)
        result, done, ceiling = race(setting, material, ours, reference)
        result["label_agreement"] = statistics.mean(_agreement(folder, name) for name in done)
        network = material.load(setting.device, setting.precision)
        result |= network_share(setting, network[0], result["images_per_s"], ceiling)
        result["stages"] = stages(setting, material, network, ceiling)
    return result


def race(
    setting: Setting, material: Material, ours: Version, reference: Version
) -> tuple[dict, list[str], float]:
    """Time two versions of one step alternately, then measure the memory of each.

    Returns:
        The results; the names of the images that both have finished, in the folders `ours0` and `reference`;
        and FLOP/s of a large matrix product, measured in the same rounds.
    """
    names, warm = material.timed(setting), _warm(setting)
    few = names[warm:][:REFERENCE_IMAGES]
    slow = reference(setting, material, [names[0], *few * setting.rounds], material.folder / "reference")
    next(slow)  # loads the model, and warms up

    def ours_in(number: int) -> float:
        output = material.folder / f"ours{number}"
        measure.check(ours(setting, material, names, output))
        return measure.steady(output.iterdir(), warm)

    def reference_in(number: int) -> float:
        start = time.perf_counter()
        measure.check(islice(slow, len(few)))
        return (time.perf_counter() - start) / len(few)

    def ceiling_in(number: int) -> float:
        return 1 / measure.matmul_rate(setting.kind, setting.precision)

    turns = {"ours": ours_in, "reference": reference_in, "ceiling": ceiling_in}
    taken = measure.take_turns(turns, setting.rounds)
    result = measure.compared(taken["ours"], taken["reference"])
    counts = {"": WATCHED[setting.kind], "reference_": REFERENCE_WATCHED}
    for (prefix, count), version in zip(counts.items(), (ours, reference), strict=True):
        watched = material.folder / f"{prefix}watched"
        peak = measure.peak_memory(version, setting, material, material.names[:count], watched)
        result |= {f"{prefix}peak_{key}": value for key, value in peak.items()}
    return result, few, 1 / statistics.median(taken["ceiling"])


def network_share(setting: Setting, model: CLIP, rate: float, ceiling: float) -> dict[str, float]:
    """Return the minimum FLOP per image, the rate that it implies, and the fraction of the peak rate.

    Args:
        rate: images/s.
        ceiling: FLOP/s of a large matrix product.
    """
    grid = [side // model.visual.patch_size for side in _size(model)]
    flop = model.visual.layers * block_flop(model, grid) + setting.labels * gradient_flop(model, grid)
    return {
        "gflop_an_image": flop / 1e9,
        "gflop_per_s": flop * rate / 1e9,
        "matmul_gflop_per_s": ceiling / 1e9,
        "ceiling_share": flop * rate / ceiling,
    }


def block_flop(model: CLIP, grid: tuple[int, int]) -> float:
    """Return the FLOP of a block: qkv, output and MLP matrices on L tokens of width C, and attention."""
    tokens, width = 1 + grid[0] * grid[1], model.visual.proj.shape[0]
    return 24 * tokens * width**2 + 4 * tokens**2 * width


def gradient_flop(model: CLIP, grid: tuple[int, int]) -> float:
    """Return the FLOP of the closed-form gradient of one label.

    The gradient passes back through the first matrix of the MLP, the output matrix of the attention, and the
    attention.
    """
    patches, width = grid[0] * grid[1], model.visual.proj.shape[0]
    return 2 * patches * (4 * width**2 + width**2 + (1 + patches) * width)


def stages(
    setting: Setting, material: Material, network: tuple[CLIP, Tensor, Tensor], ceiling: float
) -> list[dict]:
    """Time the stages of step 1, each on the output of the stage before.

    Args:
        network: see `Material.load`.
        ceiling: FLOP/s of a large matrix product.
    """
    model, text, backgrounds = network
    kind, count = setting.kind, STAGED[setting.kind]
    names, labels, size = material.names[:count], round(setting.labels), _size(model)
    grid = [side // model.visual.patch_size for side in size]
    rows = []

    def timed(name: str, work: Callable, amount: float, unit: str, most: float):
        taken = measure.seconds(work, kind=kind) / count
        rows.append(measure.stage(name, taken, amount, unit, most))
        return work()

    def decode() -> Tensor:
        images = [read_image(material.image(name)) for name in names]
        config = model.config
        return torch.stack([clip.preprocess(image, size, config.mean, config.std) for image in images])

    pixels = timed("decode and resize", decode, 1, "images/s", measure.jpeg_rate(material.image(names[0])))
    pixels = pixels.to(model.device)  # (B, 3, H', W')
    blocks = (model.visual.layers - 1) * block_flop(model, grid)
    encoded = timed("blocks", lambda: encode(model.visual, pixels), blocks / 1e9, "GFLOP/s", ceiling / 1e9)
    chosen = text[:labels].expand(count, -1, -1)  # (B, K, E)
    gradients = block_flop(model, grid) + labels * gradient_flop(model, grid)
    activations, weights, _, last = timed(
        f"gradient ({labels} labels)",
        lambda: mean_gradients(model, encoded.tokens, chosen, backgrounds),
        gradients / 1e9,
        "GFLOP/s",
        ceiling / 1e9,
    )
    cams = activation_map((weights @ activations.mT).unflatten(-1, grid))  # (B, K, h, w)
    attention = (encoded.attention + last)[:, 1:, 1:] / (encoded.num_maps + 1)  # (B, n, n)

    def affinity() -> np.ndarray:
        masks = box_masks(cams, BENCHMARK.box_threshold)
        return min_max_normalize(refine(cams, attention, masks)).cpu().numpy()

    # Passes over the n x n matrix: Sinkhorn (a sum and a division, by columns and by rows), the symmetric
    # mean, two products.
    passes = SINKHORN_ITERATIONS * 6 + 5 + 2
    moved = passes * 4 * attention.shape[-1] ** 2
    copied = measure.copy_rate(kind) / 1e9
    maps = timed("affinity", affinity, moved / 1e9, "GB/s", copied)

    def write() -> int:
        folder, image = material.folder / "stage", (data.HEIGHT, data.WIDTH)
        for name, cam in zip(names, maps, strict=True):
            content = camfile.encode(range(labels), {REFINED: cam}, image, "compact")
            store_files(folder, name, {camfile.FORMATS["compact"]: content})
        return len(content)

    timed("write", write, write() / 1e9, "GB/s", measure.copy_rate("cpu") / 1e9)
    return rows


def _size(model: CLIP) -> tuple[int, int]:
    """Return the network size (H', W') of the drawn images."""
    return clip.target_size(data.HEIGHT, data.WIDTH, model.visual.patch_size)


def _agreement(folder: Path, name: str) -> float:
    """Return the fraction of pixels with equal labels in both versions.

    A label is the argmax of the CAMs and of 1 - their maximum for the background.
    """
    _, maps = camfile.read(folder / "ours0", name)
    _, theirs = read_cams(folder / "reference" / f"{name}.npy")
    return float((_labels(maps) == _labels(theirs)).mean())


def _labels(maps: np.ndarray) -> np.ndarray:
    """Return the labels (H, W) of CAMs (K, H, W)."""
    maps = maps.astype(np.float32)
    return np.concatenate([1 - maps.max(0, keepdims=True), maps]).argmax(0)
