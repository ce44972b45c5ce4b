"""Training a segmentation network: one loop for all of them, in one process or under torchrun.

An iteration is `accumulate` batches, one step of the optimizer, and one value of the schedule. What it
does is a function of the seed and of its number, so a run that was stopped continues as if it had not been:
to the last bit on the same machine, with as many threads and ranks.
"""

import math
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from segmentation.checkpoints import FINAL, RESUME, checkpoints, write_checkpoint, write_tensors
from segmentation.dataset import Batch, Order, TrainingSet
from segmentation.distributed import WorkFailed, World, exit_after_rank_0, gather
from segmentation.inference import PRECISIONS
from segmentation.schedules import poly

LOGS = "logs"  # folder of TensorBoard's
AVERAGED = 20  # iterations whose mean loss is logged, as deeplab-pytorch has it

# (network, images (B, 3, h, w), masks (B, h, w) int64, share) -> named losses, whose sum is minimised. Sums
# over pixels are divided by share(count of pixels), see `World.share`.
Objective = Callable[[nn.Module, Tensor, Tensor, Callable[[Tensor], Tensor]], dict[str, Tensor]]

# The network, in eval mode -> scores to log, on every rank.
Validation = Callable[[nn.Module], dict[str, float]]

# (network in eval mode, images, masks) -> pictures (H, W, 3) uint8 RGB to log.
Pictures = Callable[[nn.Module, Tensor, Tensor], dict[str, np.ndarray]]


@dataclass
class Solver:
    """What the result depends on; the defaults are deeplab-pytorch's for VOC12."""

    iterations: int = 20_000
    batch_size: int = 5  # images of a batch, of all processes together
    accumulate: int = 2  # batches of an iteration
    drop_last: bool = False  # of an epoch's images those that fill no batch; false: they make a smaller one
    learning_rate: float = 2.5e-4
    momentum: float = 0.9
    weight_decay: float = 5e-4
    power: float = 0.9  # of the poly schedule
    decay_every: int = 10  # iterations between its steps
    loss: str = "ce"  # a name in segmentation.losses.LOSSES
    seed: int = 0

    def __post_init__(self):
        for name in ("iterations", "batch_size", "accumulate", "decay_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"solver.{name} must be 1 or more, got {getattr(self, name)}")
        for name in ("learning_rate", "momentum", "weight_decay", "power"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"solver.{name} must be a number of 0 or more, got {getattr(self, name)}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"solver.seed must be from 0 to 2^63 - 1, got {self.seed}")


@dataclass
class Running:
    """Where and how it runs."""

    output: str = "output/deeplab"  # checkpoints, logs, settings
    device: str = "auto"  # auto, cpu, cuda or cuda:i
    precision: str = "fp32"  # fp32, tf32, or autocast to bf16 or fp16
    channels_last: bool = True
    compile: bool = False
    deterministic: bool = False  # on a GPU: slower kernels that give the same bits every time
    sync_batchnorm: bool = False  # statistics of live batch norm over the GPUs of all ranks
    workers: int = 4  # threads that read and augment, of each process
    log_every: int = 100  # iterations, as all below; 0 means never
    picture_every: int = 1000
    validate_every: int = 5000
    save_every: int = 5000
    resume_every: int = 500
    keep: int = 5  # checkpoints beside the final one, the oldest are removed; 0: all

    def __post_init__(self):
        if self.precision not in PRECISIONS:
            raise ValueError(f"run.precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.workers < 1:
            raise ValueError(f"run.workers must be 1 or more, got {self.workers}")
        for name in ("log_every", "picture_every", "validate_every", "save_every", "resume_every", "keep"):
            if getattr(self, name) < 0:
                raise ValueError(f"run.{name} must be 0 or more, got {getattr(self, name)}")


def optimizer(groups: Sequence[Mapping[str, Any]], solver: Solver) -> torch.optim.SGD:
    """SGD over parameter groups of the keys `params`, `rate` (multiple of the learning rate) and
    `weight_decay` (whether there is any)."""
    return torch.optim.SGD(
        [
            {
                "params": group["params"],
                "lr": group["rate"] * solver.learning_rate,
                "initial_lr": group["rate"] * solver.learning_rate,
                "weight_decay": solver.weight_decay * group["weight_decay"],
            }
            for group in groups
            if group["params"]
        ],
        lr=solver.learning_rate,
        momentum=solver.momentum,
    )


class Trainer:
    """One run: `Trainer(...)`, then `run()`.

    Args:
        model: a network on its device. Frozen parts are its own business: `train()` must keep them frozen.
        groups: see `optimizer`.
        objective: see `Objective`.
        dataset: see `TrainingSet`.
        solver, running: see there.
        horizon: iterations after which the schedule reaches 0; None: all.
        validation, pictures: see there.

    The folder `running.output` gets `checkpoint_<iteration>.pth` and `checkpoint_final.pth`, state dicts of
    the network alone, `resume.pt` while training lasts, and logs for TensorBoard in `logs`.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Mapping[str, Any]],
        objective: Objective,
        dataset: TrainingSet,
        solver: Solver,
        running: Running,
        horizon: int | None = None,
        validation: Validation | None = None,
        pictures: Pictures | None = None,
    ):
        self.model, self.objective, self.dataset = model, objective, dataset
        self.solver, self.running = solver, running
        self.horizon = horizon or solver.iterations
        self.validation, self.pictures = validation, pictures
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.folder = Path(running.output)
        self.world = World(self.device)
        if solver.batch_size < self.world.size:
            raise ValueError(
                f"a batch of {solver.batch_size} images is too small for {self.world.size} processes"
            )
        self.order = Order(len(dataset.names), solver.batch_size, solver.seed, solver.drop_last)
        on_gpu = self.device.type == "cuda"
        if on_gpu:  # pinned memory and statistics belong to the current one
            torch.cuda.set_device(self.device)
        cv2.setNumThreads(0)  # samples are read by threads of our own
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = running.precision == "tf32"
        torch.backends.cudnn.benchmark = not running.deterministic  # all training images have one size
        if running.deterministic != torch.are_deterministic_algorithms_enabled():  # importing what it needs
            torch.use_deterministic_algorithms(running.deterministic, warn_only=True)  # takes seconds
        if running.sync_batchnorm and on_gpu and self.world.size > 1:
            self.model = model = nn.SyncBatchNorm.convert_sync_batchnorm(model, self.world.group)
        if running.channels_last:
            model.to(memory_format=torch.channels_last)
        self.optimizer = optimizer(groups, solver)
        # Small gradients vanish in half precision unless they are scaled; bfloat16 has float32's range.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=running.precision == "fp16")
        if running.compile:
            model.compile()
        self.network = model  # what is called: DDP's wrapper, if there is one
        if self.world.size > 1:
            self.network = DistributedDataParallel(
                model, device_ids=[self.device.index] if on_gpu else None, process_group=self.world.group
            )
        self.done = 0  # iterations
        self.recent: deque[float] = deque(maxlen=AVERAGED)
        self.validated = 0  # the iteration after which that was done last
        self.last_good = "none yet"

    def run(self) -> bool:
        """Train to the end, or until SIGTERM or SIGINT, which lets an iteration end and saves.

        Returns:
            Whether training is complete.

        Raises:
            WorkFailed: a file is missing or wrong, or the loss is not finite; the sentence says which.
        """
        total, accumulate = self.solver.iterations, self.solver.accumulate
        numbers = range(self.done * accumulate, total * accumulate)
        world = self.world
        batches = self.dataset.batches(self.order, numbers, world.rank, world.size, self.running.workers)
        clock, images = time.monotonic(), 0
        self.network.train()
        bar = tqdm(
            total=total, initial=self.done, unit="iteration", disable=True if world.rank else None
        )
        with stopping(twice=world.size > 1) as stop, self._logs() as writer, bar:
            self._validate(writer)  # if the run was ended before or while it did
            while self.done < total:
                chunk = self._next(batches, stop)
                if chunk is None:
                    self.check_finite()
                    self.save_resume()
                    return False
                images += sum(len(self.order.batch(self.done * accumulate + n)) for n in range(accumulate))
                try:
                    losses = self.iterate(chunk)
                except torch.cuda.OutOfMemoryError:
                    raise WorkFailed(
                        "training stopped: the GPU's memory does not suffice; halve solver.batch_size and "
                        "double solver.accumulate, or take run.precision=bf16"
                    ) from None
                bar.update()
                bar.set_postfix(loss=f"{self.recent[-1]:.4f}", refresh=False)
                if writer and _due(self.done, self.running.log_every):
                    self._log(writer, losses, images / (time.monotonic() - clock))
                    clock, images = time.monotonic(), 0
                self._paint(writer, chunk[-1])
                if writer:
                    writer.flush()
                self._save()  # before validation, which may take longer than who asks to stop will wait
                self._validate(writer)
        return True

    def _logs(self) -> AbstractContextManager[SummaryWriter | None]:
        """The writer, closed at the end whatever that is; None on other ranks than 0."""
        if self.world.rank:
            return nullcontext()
        # What an earlier process logged after the iteration that it is resumed at counts no more.
        return SummaryWriter(self.folder / LOGS, purge_step=self.done + 1)

    def _next(self, batches: Iterator[Batch], stop: threading.Event) -> list[Batch] | None:
        """The batches of the next iteration, or None when any rank was asked to stop."""
        chunk, failure = [], ""
        try:
            chunk = [next(batches) for _ in range(self.solver.accumulate)]
        except (ValueError, OSError) as error:
            failure = str(error)
        stopped, failed = self.world.any(stop.is_set(), bool(failure))
        if failed:
            self.check_finite()
            self.save_resume()  # the file may be mended
            self._fail(next(filter(None, gather(failure))))
        return None if stopped else chunk

    def iterate(self, chunk: Sequence[Batch]) -> dict[str, float]:
        """One iteration: forward and backward of each batch, one step.

        Returns:
            The losses by name; means over the batches, as the gradients are.
        """
        done, solver = self.done, self.solver
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * poly(done, self.horizon, solver.power, solver.decay_every)
        # Dropout's numbers are a function of the iteration too, so there is no generator to save.
        torch.manual_seed(hash_seed(solver.seed, done, self.world.rank))
        self.optimizer.zero_grad(set_to_none=True)
        summed: dict[str, Tensor] = {}
        half = PRECISIONS[self.running.precision]
        autocast = torch.autocast(self.device.type, half, enabled=half is not None)
        for number, batch in enumerate(chunk, start=1):
            last = number == len(chunk)
            alone = nullcontext() if last or self.world.size == 1 else self.network.no_sync()
            images, labels = self._on_device(batch)
            with alone:
                with autocast:
                    losses = self.objective(self.network, images, labels, self.world.share)
                self.scaler.scale(sum(losses.values()) / len(chunk)).backward()
            for name, loss in losses.items():
                summed[name] = summed.get(name, 0) + loss.detach()
        values = self.world.mean(torch.stack(list(summed.values())).double().cpu()) / len(chunk)
        if not values.isfinite().all():
            parts = gather([name for batch in chunk for name in batch.names])
            names = ", ".join(dict.fromkeys(name for part in parts for name in part))
            self._fail(
                f"the loss of iteration {done + 1} is {float(values.sum())}; its images: {names}; last good "
                f"checkpoint: {self.last_good}; a lower learning_rate may help"
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.done += 1
        self.recent.append(float(values.sum()))
        return dict(zip(summed, values.tolist(), strict=True))

    def _on_device(self, batch: Batch) -> tuple[Tensor, Tensor]:
        images, labels = torch.from_numpy(batch.images), torch.from_numpy(batch.labels)
        if self.device.type == "cuda":
            images, labels = images.pin_memory(), labels.pin_memory()
        layout = torch.channels_last if self.running.channels_last else torch.contiguous_format
        images = images.to(self.device, self.dtype, non_blocking=True, memory_format=layout)
        return images, labels.to(self.device, non_blocking=True)

    def _fail(self, sentence: str) -> None:
        exit_after_rank_0()
        raise WorkFailed(f"training stopped: {sentence}")

    def _log(self, writer: SummaryWriter, losses: Mapping[str, float], rate: float) -> None:
        writer.add_scalar("loss/train", sum(self.recent) / len(self.recent), self.done)
        for name, loss in losses.items():
            writer.add_scalar(f"loss/{name}", loss, self.done)
        for index, group in enumerate(self.optimizer.param_groups):
            writer.add_scalar(f"lr/group_{index}", group["lr"], self.done)
        writer.add_scalar("images_per_second", rate, self.done)
        if self.device.type == "cuda":
            writer.add_scalar("gpu_memory_gb", torch.cuda.max_memory_allocated() / 2**30, self.done)

    def _paint(self, writer: SummaryWriter | None, batch: Batch) -> None:
        if not (writer and self.pictures and _due(self.done, self.running.picture_every)):
            return
        self.network.eval()
        with torch.inference_mode():
            for name, picture in self.pictures(self.model, *self._on_device(batch)).items():
                writer.add_image(name, picture, self.done, dataformats="HWC")
        self.network.train()

    def _validate(self, writer: SummaryWriter | None) -> None:
        """Validate if it is time, and not done yet."""
        due = self.done > self.validated and _due(self.done, self.running.validate_every)
        if not (self.validation and due):
            return
        self.world.same(self.model.buffers())  # live batch norm counts on each rank alone; rank 0's are saved
        self.network.eval()
        torch.backends.cudnn.benchmark = False  # whole images have many sizes
        with torch.inference_mode():
            scores = self.validation(self.model)
        torch.backends.cudnn.benchmark = not self.running.deterministic
        self.network.train()
        self.validated = self.done
        if writer:
            told = ", ".join(f"{name} {score:.4f}" for name, score in scores.items())
            tqdm.write(f"iteration {self.done}: {told}", file=sys.stderr)
            for name, score in scores.items():
                writer.add_scalar(f"validation/{name}", score, self.done)
            writer.flush()
        if self.done < self.solver.iterations:
            self.save_resume()

    def _save(self) -> None:
        """Write what is due: a checkpoint, the final one, the resume file."""
        complete = self.done == self.solver.iterations
        save = complete or _due(self.done, self.running.save_every)
        if save or _due(self.done, self.running.resume_every):
            self.check_finite()
        if save and self.world.rank == 0:
            name = FINAL if complete else f"checkpoint_{self.done}.pth"
            write_checkpoint(self.model, self.folder / name)
            self.last_good = str(self.folder / name)
        if complete and self.world.rank == 0:
            (self.folder / RESUME).unlink(missing_ok=True)
        elif not complete and (save or _due(self.done, self.running.resume_every)):
            self.save_resume()
        if save and self.running.keep and self.world.rank == 0:
            for old in checkpoints(self.folder)[: -self.running.keep]:
                old.unlink()

    def check_finite(self) -> None:
        """Raises WorkFailed if a parameter or statistic is not finite, so that no bad one is saved."""
        finite = all(bool(value.isfinite().all()) for value in self.model.state_dict().values())
        if self.world.any(not finite)[0]:  # live statistics are each rank's own
            self._fail(
                f"after iteration {self.done} the weights are no longer finite; last good checkpoint: "
                f"{self.last_good}; a lower learning_rate may help"
            )

    def save_resume(self) -> None:
        """Write all that a later `load_resume` needs."""
        if self.world.rank:
            return
        state = {
            "iteration": self.done,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "recent_losses": list(self.recent),
            "validated": self.validated,
            "last_good": self.last_good,
        }
        write_tensors(state, self.folder / RESUME)

    def load_resume(self) -> bool:
        """Continue from the resume file, if there is one; all ranks read it.

        Raises:
            ValueError: it is damaged, or another network's.
        """
        file = self.folder / RESUME
        if not file.is_file():
            return False
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.done, self.validated = state["iteration"], state["validated"]
            self.recent.extend(state["recent_losses"])
            self.last_good = state["last_good"]
        except (OSError, MemoryError, torch.cuda.OutOfMemoryError):  # no fault of the file
            raise
        except Exception:  # damaged files fail in any way they like
            raise ValueError(f"{file} is damaged or of another network: remove it to start anew") from None
        return True


def hash_seed(*parts: int) -> int:
    """A seed of 64 bits from several numbers."""
    low, high = np.random.SeedSequence(parts).generate_state(2, np.uint32).tolist()
    return low | high << 32


@contextmanager
def stopping(twice: bool = False) -> Iterator[threading.Event]:
    """SIGTERM and SIGINT set an event; a second SIGINT interrupts at once.

    Args:
        twice: signals may come twice, as under torchrun, which passes on the Ctrl-C that its processes may
            have got from the terminal already: then a second one is no more than the first.
    """
    event = threading.Event()
    usual = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def ask(number, _):
        event.set()
        if number == signal.SIGINT and not twice:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    if threading.current_thread() is threading.main_thread():  # only there may handlers be set
        for number in usual:
            signal.signal(number, ask)
    try:
        yield event
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in usual.items():
                signal.signal(number, handler)


def _due(done: int, every: int) -> bool:
    return every > 0 and done % every == 0
