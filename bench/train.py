"""Step 3, one training iteration, from batches in memory to updated weights; reading is timed separately."""

import statistics
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import clip
from bench import data, measure
from bench.measure import Setting
from bench.reference_training import plain, reference_iteration
from deeplab.config import AugmentConfig, Config, ModelConfig, OptimConfig
from deeplab.recipe import NETWORKS, objective
from pipeline.processes import Outcome
from segmentation.benchmark import Benchmark
from segmentation.config import RunConfig
from segmentation.dataset import Batch, Order, TrainingSet
from segmentation.inference import PRECISIONS
from segmentation.trainer import Trainer

CROPS = {"deeplab_v2": 321, "deeplab_v1_r38": 448}  # as published
BATCHES = {"cpu": (1, 1), "cuda": (5, 2)}  # images per batch, batches per iteration; on a GPU VOC12's recipe
BENCHMARK = Benchmark("drawn", [f"class {index}" for index in range(data.CLASSES)])
# A hundredth of the recipe's rate. With the recipe's rate, random weights soon saturate the softmax, and its
# gradients become denormal numbers, which slow a CPU down many times. Trained weights do not cause this.
LEARNING_RATE = 2.5e-6
DRAWN = 16  # number of drawn images
READERS = (1, 2, 4)  # numbers of reading threads
WATCHED = 2  # iterations while memory is measured; the first one allocates the optimizer's state
WORDS = {
    "channels_last": {"channels_last": True},
    "contiguous": {"channels_last": False},
    "compile": {"compile": True},
    "eager": {"compile": False},
}


def run_config(variant: str) -> RunConfig:
    """Return the settings of a variant such as "bf16", "fp32+contiguous" or "bf16+channels_last+compile".

    Settings that the variant does not name have the trainer's defaults.

    Raises:
        ValueError: the precision or a word is unknown.
    """
    precision, *words = variant.split("+")
    if precision not in PRECISIONS or not WORDS.keys() >= {*words}:
        raise ValueError(
            f"--variants: {variant!r} is not a precision ({', '.join(PRECISIONS)}), followed by any of "
            f"+{', +'.join(WORDS)}"
        )
    options = {key: value for word in words for key, value in WORDS[word].items()}
    return RunConfig(precision=precision, **options)


@dataclass(frozen=True)
class Task:
    """Inputs of all versions.

    Attributes:
        dataset: drawn images and masks.
        config: the recipe, with another learning rate.
    """

    dataset: TrainingSet
    config: Config

    @classmethod
    def make(cls, folder: Path, setting: Setting) -> "Task":
        """Draw images and masks of VOC's size."""
        names = data.write_images(folder, DRAWN, setting.labels)
        data.write_cams(folder, DRAWN, setting.labels)  # also writes the masks
        batch_size, accumulate = BATCHES[setting.kind]
        config = Config(
            model=ModelConfig(setting.network, width=setting.width),
            augment=AugmentConfig(crop=setting.crop or CROPS[setting.network]),
            solver=OptimConfig(
                batch_size=setting.batch or batch_size,
                accumulate=setting.accumulate or accumulate,
                learning_rate=LEARNING_RATE,
            ),
        )
        folders = str(folder / "images"), str(folder / "truth")
        transform = NETWORKS[setting.network].transform(config)
        return cls(TrainingSet(names, *folders, BENCHMARK.channels, transform), config)

    def batches(self) -> list[Batch]:
        """Return the batches of one iteration."""
        solver = self.config.solver
        order = Order(len(self.dataset.names), solver.batch_size, solver.seed, drop_last=True)
        return list(self.dataset.batches(order, range(solver.accumulate)))

    def network(self, setting: Setting) -> nn.Module:
        """Return a network with random weights, the same at each call."""
        torch.manual_seed(0)
        model = NETWORKS[setting.network].build(self.config, BENCHMARK)
        return model.to(clip.pick_device(setting.device))

    def trainer(self, setting: Setting, variant: str) -> Trainer:
        """Return the trainer of `deeplab.train`; one call of `iterate` is an iteration without reading."""
        model = self.network(setting)
        return Trainer(
            model,
            *NETWORKS[setting.network].optimizer(model, self.config),
            objective(self.config),
            self.dataset,
            self.config.solver,
            run_config(variant),
        )


class Reference:
    """The reference: float32, eager, contiguous memory, no TF32."""

    def __init__(self, setting: Setting, task: Task):
        model = task.network(setting)
        self.optimizer, self.schedule = NETWORKS[setting.network].optimizer(model, task.config)
        self.model = plain(model)
        self.losses: list[float] = []

    def iterate(self, batches: Sequence[Batch]) -> None:
        self.losses.append(
            reference_iteration(self.model, self.optimizer, batches, self.schedule(1, len(self.losses)))
        )


def watched(setting: Setting, task: Task, variant: str | None) -> Iterator[Outcome]:
    """Run iterations to measure their memory; variant None is the reference."""
    version = Reference(setting, task) if variant is None else task.trainer(setting, variant)
    batches = task.batches()
    allow_tf32(variant)
    yield Outcome("")
    for _ in range(WATCHED):
        version.iterate(batches)
        yield Outcome("")


def allow_tf32(variant: str | None) -> None:
    """Set TF32 for a variant: trainers set it once per process, but variants alternate in one process."""
    tf32 = variant is not None and run_config(variant).precision == "tf32"
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32


def run(setting: Setting) -> dict:
    """Measure; see `bench.measure.COMMON` for the results that every subcommand returns.

    Their values are those of the first variant; "variants" contains the results of each variant.
    """
    setting.limit_threads()
    variants = dict.fromkeys(setting.variants)
    for variant in variants:
        run_config(variant)
    with measure.scratch() as folder:
        task = Task.make(folder, setting)
        batches = task.batches()
        images = sum(len(batch.names) for batch in batches)
        reference = Reference(setting, task)
        trainers = {variant: task.trainer(setting, variant) for variant in variants}
        flop = count_flop(reference, batches)  # also warms up
        for variant, trainer in trainers.items():
            allow_tf32(variant)
            trainer.iterate(batches)
        figures = race(setting, {None: reference, **trainers}, batches, images)
        result = {"images_an_iteration": images, "gflop_an_image": sum(flop.values()) / images / 1e9}
        peak = measure.peak_memory(watched, setting, task, None)
        result |= {f"reference_peak_{key}": value for key, value in peak.items()}
        stages = reading(setting, task)
        for variant, trainer in trainers.items():
            rows, ceiling = figures[variant], figures[variant].pop("matmul_gflop_per_s") * 1e9
            rows["ceiling_share"] = sum(flop.values()) / images * rows["images_per_s"] / ceiling
            rows["label_agreement"] = agreement(trainer.model, reference.model, batches)
            rows["loss_difference"] = difference(trainer.recent, reference.losses)
            peak = measure.peak_memory(watched, setting, task, variant)
            rows |= {f"peak_{key}": value for key, value in peak.items()}
            allow_tf32(variant)
            stages += parts(setting, variant, trainer, batches, flop, ceiling)
        return {**figures[next(iter(variants))], **result, "variants": figures, "stages": stages}


def race(
    setting: Setting, versions: dict[str | None, Trainer | Reference], batches: list[Batch], images: int
) -> dict[str, dict[str, float]]:
    """Time one iteration of each version per round, and the matrix product in each precision.

    Returns:
        variant -> the rates of `bench.measure.compared`, and "matmul_gflop_per_s".
    """

    def turn(variant: str | None, version: Trainer | Reference):
        def taken(number: int) -> float:
            allow_tf32(variant)
            measure.synchronize(setting.kind)
            start = time.perf_counter()
            version.iterate(batches)
            measure.synchronize(setting.kind)
            return (time.perf_counter() - start) / images

        return taken

    def ceiling(precision: str):
        def taken(number: int) -> float:
            allow_tf32(precision)
            return 1 / measure.matmul_rate(setting.kind, "fp32" if precision == "tf32" else precision)

        return taken

    turns = {f"iterate {variant}": turn(variant, version) for variant, version in versions.items()}
    precisions = {variant: run_config(variant).precision for variant in versions if variant is not None}
    turns |= {f"matmul {precision}": ceiling(precision) for precision in precisions.values()}
    taken = measure.take_turns(turns, setting.rounds)
    return {
        variant: {
            **measure.compared(taken[f"iterate {variant}"], taken["iterate None"]),
            "matmul_gflop_per_s": 1e-9 / statistics.median(taken[f"matmul {precision}"]),
        }
        for variant, precision in precisions.items()
    }


def count_flop(reference: Reference, batches: list[Batch]) -> dict[str, int]:
    """Return the FLOP of an iteration's convolutions and products, forward and backward, by running it."""
    device = next(reference.model.parameters()).device
    forward, both = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with forward, torch.no_grad():
        for batch in batches:
            reference.model(torch.from_numpy(batch.images).to(device))
    allow_tf32(None)
    with both:
        reference.iterate(batches)
    ahead = forward.get_total_flops()
    return {"forward": ahead, "backward": both.get_total_flops() - ahead}


def agreement(ours: nn.Module, theirs: nn.Module, batches: list[Batch]) -> float:
    """Return the fraction of pixels to which two networks assign the same class, on the first batch."""
    allow_tf32(None)
    labels = []
    for model in (ours, theirs):
        images = torch.from_numpy(batches[0].images).to(next(model.parameters()).device)
        model.eval()
        with torch.inference_mode():
            labels.append(model.forward(images).argmax(1))  # not the compiled function, which is for training
        model.train()
    return float((labels[0] == labels[1]).float().mean())


def difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the largest relative difference of the latest losses."""
    return max(abs(a - b) / abs(b) for a, b in zip(reversed(ours), reversed(theirs), strict=False))


def reading(setting: Setting, task: Task) -> list[dict]:
    """Time reading, decoding and augmenting samples with several numbers of threads; files are cached."""
    dataset = task.dataset
    count, most = len(dataset.names), measure.jpeg_rate(Path(dataset.image_dir) / f"{dataset.names[0]}.jpg")
    order = Order(count, 1, task.config.solver.seed)
    rows = []
    for threads in READERS:

        def read(threads: int = threads) -> None:
            deque(dataset.batches(order, range(count), threads=threads), maxlen=0)

        taken = measure.seconds(read) / count
        name = f"reading, {threads} thread{'s' if threads > 1 else ''}"
        rows.append(measure.stage(name, taken, 1, "samples/s", threads * most))
    return rows


def parts(
    setting: Setting,
    variant: str,
    trainer: Trainer,
    batches: list[Batch],
    flop: dict[str, int],
    ceiling: float,
) -> list[dict]:
    """Time the stages of an iteration inside the trainer.

    Args:
        flop: see `count_flop`.
        ceiling: FLOP/s of a large matrix product.
    """
    images = sum(len(batch.names) for batch in batches)
    groups = trainer.optimizer.param_groups
    weights = sum(parameter.nbytes for group in groups for parameter in group["params"])
    moved = 5 * weights / 1e9  # read: weights, gradients, momentum; written: weights, momentum
    copied = measure.copy_rate(setting.kind) / 1e9
    repeats = [timed(setting.kind, trainer, batches) for _ in range(measure.REPEATS)]
    rows = []
    for name, amount, unit, most in (
        ("forward", flop["forward"] / 1e9, "GFLOP/s", ceiling / 1e9),
        ("backward", flop["backward"] / 1e9, "GFLOP/s", ceiling / 1e9),
        ("optimizer", moved, "GB/s", copied),
    ):
        # The gradient scaler of fp16 skips a step whose gradients overflow.
        taken = [stages[name] for stages in repeats if stages[name] > 0]
        if taken:
            seconds = statistics.median(taken) / images
            rows.append(measure.stage(f"{name} {variant}", seconds, amount / images, unit, most))
    return rows


def timed(kind: str, trainer: Trainer, batches: list[Batch]) -> dict[str, float]:
    """Return the seconds of an iteration in "forward" (with the losses), "backward" and "optimizer"."""

    def now(*_) -> float:
        measure.synchronize(kind)
        return time.perf_counter()

    objective, starts, ends, steps = trainer.objective, [], [], []

    def observed(*arguments) -> dict[str, Tensor]:
        starts.append(now())
        losses = objective(*arguments)
        ends.append(now())
        return losses

    hooks = [
        trainer.optimizer.register_step_pre_hook(lambda *_: steps.append(now())),
        trainer.optimizer.register_step_post_hook(lambda *_: steps.append(now())),
    ]
    trainer.objective = observed
    try:
        trainer.iterate(batches)
    finally:
        trainer.objective = objective
        for hook in hooks:
            hook.remove()
    finished = steps[0] if steps else now()
    return {
        "forward": sum(end - start for start, end in zip(starts, ends, strict=True)),
        "backward": sum(start - end for start, end in zip([*starts[1:], finished], ends, strict=True)),
        "optimizer": steps[1] - steps[0] if steps else 0.0,
    }
