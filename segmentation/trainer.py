"""Training a segmentation network: one loop for all methods, in one process or under torchrun.

An iteration is `accumulate` batches and one step of the optimizer. Its images and random numbers depend only
on the seed and its number. A run that was stopped and resumed therefore gives the same weights as an
uninterrupted run, bit for bit on the same machine with the same number of threads and ranks.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from foundation.logs import log, no_progress
from foundation.tensors import read_tensors
from segmentation import checkpoints
from segmentation.checkpoints import FINAL, RESUME, trained_state
from segmentation.config import OptimConfig, RunConfig
from segmentation.dataset import Batch, Order, TrainingSet
from segmentation.distributed import WorkFailed, World, exit_after_rank_0, gather, stopping
from segmentation.inference import PRECISIONS
from segmentation.losses import GlobalCount
from segmentation.schedules import Schedule

LOGS = "logs"  # TensorBoard's folder
AVERAGED = 20  # iterations whose mean loss is logged, as in deeplab-pytorch

# (network, batch of tensors, global_count) -> named losses; their sum is minimized. Sums over pixels are
# divided by global_count(number of pixels), see `GlobalCount`. An objective with state also has
# `state_dict()` and `load_state_dict(state)` for resume files; its state must be equal on all ranks.
Objective = Callable[[nn.Module, Batch, GlobalCount], dict[str, Tensor]]

# The network, in eval mode -> scores to log; called on every rank.
Validation = Callable[[nn.Module], dict[str, float]]

# (network in eval mode, batch of tensors) -> example figures (H, W, 3) uint8 RGB to log, by name.
Figures = Callable[[nn.Module, Batch], dict[str, np.ndarray]]


class Trainer:
    """One run: `Trainer(...)`, then `run()`.

    Args:
        model: network on its device. If its batch norm is frozen, `model.train()` must keep it frozen.
        optimizer: of the trained parameters. The initial learning rate of each group is its base rate.
        schedule, objective, dataset, optim, run, validation, figures: see their types.
        frozen: names of the model's submodules that are not trained. Their parameters get no gradients, they
            stay in eval mode, and checkpoints and resume files do not contain them.

    The trainer writes to the folder `run.output`: `checkpoint_<iteration>.pth` and `checkpoint_final.pth`
    (state dicts of the network), `resume.pt` during training, and TensorBoard logs in `logs`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        objective: Objective,
        dataset: TrainingSet,
        optim: OptimConfig,
        run: RunConfig,
        frozen: Collection[str] = (),
        validation: Validation | None = None,
        figures: Figures | None = None,
    ):
        self.optimizer, self.schedule, self.objective = optimizer, schedule, objective
        self.dataset, self.optim, self.config, self.frozen = dataset, optim, run, frozen
        self.validation, self.figures = validation, figures
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.folder = Path(run.output)
        self.world = World(self.device)
        if optim.batch_size < self.world.size:
            raise ValueError(
                f"solver.batch_size {optim.batch_size} is too small for {self.world.size} processes: each "
                "needs at least one image"
            )
        self.order = Order(len(dataset.names), optim.batch_size, optim.seed, optim.drop_last)
        on_gpu = self.device.type == "cuda"
        if on_gpu:  # torch uses the current device for pinned memory and memory statistics
            torch.cuda.set_device(self.device)
        cv2.setNumThreads(0)  # `TrainingSet.batches` already runs OpenCV in several threads
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = run.precision == "tf32"
        torch.backends.cudnn.benchmark = not run.deterministic  # all training images have one size
        if run.deterministic != torch.are_deterministic_algorithms_enabled():  # the call takes seconds
            torch.use_deterministic_algorithms(run.deterministic, warn_only=True)
        if run.sync_batchnorm and on_gpu and self.world.size > 1:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model, self.world.group)
        for name in frozen:
            model.get_submodule(name).requires_grad_(False)
        if run.channels_last:
            model.to(memory_format=torch.channels_last)
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])  # torch's schedulers use this key for the base rate
        # float16 rounds small gradients to zero unless they are scaled; bfloat16 has the range of float32.
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=run.precision == "fp16")
        if run.compile:
            model.compile()
        self.model = self.network = model  # `network` is the DDP wrapper if there are several ranks
        if self.world.size > 1:
            self.network = DistributedDataParallel(
                model, device_ids=[self.device.index] if on_gpu else None, process_group=self.world.group
            )
        self.done = 0  # completed iterations
        self.recent: deque[float] = deque(maxlen=AVERAGED)  # losses of the last iterations
        self.validated = 0  # iteration of the last validation
        self.last_good = "none yet"
        self.after_save: Callable[[], None] | None = None  # called on rank 0; it may raise

    def run(self) -> bool:
        """Train to the end. After SIGTERM or SIGINT, finish the iteration, write the resume file and return.

        Returns:
            Whether training is complete.

        Raises:
            WorkFailed: a file is missing or invalid, or the loss is not finite; the message names the cause.
        """
        world, total, accumulate = self.world, self.optim.iterations, self.optim.accumulate
        numbers = range(self.done * accumulate, total * accumulate)
        batches = self.dataset.batches(self.order, numbers, world.rank, world.size, self.config.workers)
        clock, images = time.monotonic(), 0
        self._set_mode(training=True)
        bar = tqdm(total=total, initial=self.done, unit="iteration", disable=no_progress(world.rank > 0))
        # Remove log entries that an earlier process wrote after the resumed iteration.
        logs = nullcontext() if world.rank else SummaryWriter(self.folder / LOGS, purge_step=self.done + 1)
        with stopping(twice=world.size > 1) as stop, logs as writer, bar:
            self._validate(writer)  # needed if the last run ended before or during validation
            while self.done < total:
                chunk = self._next(batches, stop)
                if chunk is None:
                    self.save_resume()
                    return False
                images += sum(len(self.order.batch(self.done * accumulate + n)) for n in range(accumulate))
                try:
                    losses = self.iterate(chunk)
                except torch.cuda.OutOfMemoryError:
                    raise WorkFailed(
                        "training stopped: the GPU is out of memory; halve solver.batch_size and double "
                        "solver.accumulate, or set run.precision=bf16"
                    ) from None
                bar.update()
                bar.set_postfix(loss=f"{self.recent[-1]:.4f}", refresh=False)
                if writer:
                    # TensorBoard's thread would die if the run folder was removed; `after_save` reports it.
                    (self.folder / LOGS).mkdir(parents=True, exist_ok=True)
                    if self._is_due(self.config.log_every):
                        self._log(writer, losses, images / (time.monotonic() - clock))
                        clock, images = time.monotonic(), 0
                    if self.figures and self._is_due(self.config.picture_every):
                        self._log_figures(writer, chunk[-1])
                    writer.flush()
                self._save()  # before validation: a batch system may kill the job during it
                self._validate(writer)
        return True

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.done % every == 0

    def _set_mode(self, training: bool) -> None:
        self.network.train(training)
        for name in self.frozen:
            self.model.get_submodule(name).eval()

    def _next(self, batches: Iterator[Batch], stop: threading.Event) -> list[Batch] | None:
        """Return the batches of the next iteration, or None if any rank got a stop signal."""
        chunk, failure = [], ""
        try:
            chunk = [next(batches) for _ in range(self.optim.accumulate)]
        except (ValueError, OSError) as error:
            failure = str(error)
        stopped, failed = self.world.any(stop.is_set(), bool(failure))
        if failed:
            self.save_resume()  # the user may repair the file and resume
            self._fail(next(filter(None, gather(failure))))
        return None if stopped else chunk

    def iterate(self, chunk: Sequence[Batch]) -> dict[str, float]:
        """Run one iteration: forward and backward pass of each batch, then one optimizer step.

        Returns:
            Name -> loss, the mean over the batches.
        """
        done = self.done
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule(group["initial_lr"], done)
        # Dropout depends only on the seed and the iteration, so no generator state is saved.
        torch.manual_seed(hash_seed(self.optim.seed, done, self.world.rank))
        self.optimizer.zero_grad(set_to_none=True)
        summed: dict[str, Tensor] = {}
        half = PRECISIONS[self.config.precision]
        autocast = torch.autocast(self.device.type, half, enabled=half is not None)
        for number, batch in enumerate(chunk, start=1):
            last = number == len(chunk)
            sync = nullcontext() if last or self.world.size == 1 else self.network.no_sync()
            batch = self._on_device(batch)
            with sync:
                with autocast:
                    losses = self.objective(self.network, batch, self.world.mean)
                self.scaler.scale(sum(losses.values()) / len(chunk)).backward()
            for name, loss in losses.items():
                summed[name] = summed.get(name, 0) + loss.detach()
        values = self.world.mean(torch.stack(list(summed.values())).double().cpu()) / len(chunk)
        if not values.isfinite().all():
            parts = gather([name for batch in chunk for name in batch.names])
            names = ", ".join(dict.fromkeys(name for part in parts for name in part))
            self._fail(
                f"the loss of iteration {done + 1} is {float(values.sum())}; its images: {names}; last good "
                f"checkpoint: {self.last_good}; a lower solver.learning_rate may help"
            )
        # Gradients can be clipped here, after scaler.unscale_(optimizer).
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.done += 1
        self.recent.append(float(values.sum()))
        return dict(zip(summed, values.tolist(), strict=True))

    def _on_device(self, batch: Batch) -> Batch:
        """Return a batch of tensors on the training device."""

        def moved(array: np.ndarray, **options) -> Tensor:
            tensor = torch.from_numpy(array)
            tensor = tensor.pin_memory() if self.device.type == "cuda" else tensor
            return tensor.to(self.device, non_blocking=True, **options)

        layout = torch.channels_last if self.config.channels_last else torch.contiguous_format
        return Batch(
            moved(batch.images, dtype=self.dtype, memory_format=layout),
            moved(batch.labels),
            batch.names,
            {key: moved(value) if isinstance(value, np.ndarray) else value
             for key, value in batch.extras.items()},
        )  # fmt: skip

    def _fail(self, message: str) -> None:
        exit_after_rank_0()
        raise WorkFailed(f"training stopped: {message}")

    def _log(self, writer: SummaryWriter, losses: Mapping[str, float], images_per_second: float) -> None:
        writer.add_scalar("loss/train", sum(self.recent) / len(self.recent), self.done)
        for name, loss in losses.items():
            writer.add_scalar(f"loss/{name}", loss, self.done)
        for index, group in enumerate(self.optimizer.param_groups):
            writer.add_scalar(f"lr/group_{index}", group["lr"], self.done)
        writer.add_scalar("images_per_second", images_per_second, self.done)
        if self.device.type == "cuda":
            writer.add_scalar("gpu_memory_gb", torch.cuda.max_memory_allocated() / 2**30, self.done)

    def _log_figures(self, writer: SummaryWriter, batch: Batch) -> None:
        self._set_mode(training=False)
        with torch.inference_mode():
            for name, figure in self.figures(self.model, self._on_device(batch)).items():
                writer.add_image(name, figure, self.done, dataformats="HWC")
        self._set_mode(training=True)

    def _validate(self, writer: SummaryWriter | None) -> None:
        """Validate if it is due and this iteration was not validated before."""
        due = self.done > self.validated and self._is_due(self.config.validate_every)
        if not (self.validation and due):
            return
        # Ranks can have different batch norm statistics; validation and checkpoints use those of rank 0.
        self.world.copy_from_rank_0(self.model.buffers())
        self._set_mode(training=False)
        torch.backends.cudnn.benchmark = False  # validation images have many sizes
        with torch.inference_mode():
            scores = self.validation(self.model)
        torch.backends.cudnn.benchmark = not self.config.deterministic
        self._set_mode(training=True)
        self.validated = self.done
        if writer:
            line = ", ".join(f"{name} {score:.4f}" for name, score in scores.items())
            log.info("iteration %d: %s", self.done, line)
            for name, score in scores.items():
                writer.add_scalar(f"validation/{name}", score, self.done)
            writer.flush()
        if self.done < self.optim.iterations:
            self.save_resume()

    def _save(self) -> None:
        """Write the checkpoint and the resume file that are due after this iteration."""
        complete = self.done == self.optim.iterations
        save = complete or self._is_due(self.config.save_every)
        if save:
            self.check_finite()
        if save and self.world.rank == 0:
            file = self.folder / (FINAL if complete else f"checkpoint_{self.done}.pth")
            checkpoints.write_checkpoint(self.model, file, self.frozen)
            self.last_good = str(file)
            if self.config.keep:
                for old in checkpoints.numbered_checkpoints(self.folder)[: -self.config.keep]:
                    old.unlink()
        if complete and self.world.rank == 0:
            (self.folder / RESUME).unlink(missing_ok=True)
        elif not complete and (save or self._is_due(self.config.resume_every)):
            self.save_resume()
        if complete and self.world.rank == 0 and self.after_save:
            self.after_save()

    def check_finite(self) -> None:
        """Raise WorkFailed if a parameter or statistic is not finite, on any rank."""
        state = trained_state(self.model, self.frozen)
        finite = all(bool(value.isfinite().all()) for value in state.values())
        if self.world.any(not finite)[0]:  # ranks can have different batch norm statistics
            self._fail(
                f"after iteration {self.done} the weights are not finite; last good checkpoint: "
                f"{self.last_good}; a lower solver.learning_rate may help"
            )

    def save_resume(self) -> None:
        """Write the resume file, see `load_resume`. All ranks must call this.

        Raises:
            WorkFailed: see `check_finite`.
        """
        self.check_finite()
        if self.world.rank:
            return
        state = {
            "iteration": self.done,
            "model": trained_state(self.model, self.frozen),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "recent_losses": list(self.recent),
            "validated": self.validated,
            "last_good": self.last_good,
        }
        if hasattr(self.objective, "state_dict"):
            state["objective"] = self.objective.state_dict()
        checkpoints.write_tensors(state, self.folder / RESUME)
        if self.after_save:
            self.after_save()

    def load_resume(self) -> bool:
        """Continue from the resume file and return True; return False if there is none.

        Raises:
            ValueError: the file is damaged, contains NaN or infinity, or belongs to another network.
        """
        file = self.folder / RESUME
        if not file.is_file():
            return False
        try:
            state = read_tensors(file)
            if state["model"].keys() != trained_state(self.model, self.frozen).keys():
                raise ValueError("its tensors belong to another network")
            if not all(type(state[key]) is int and state[key] >= 0 for key in ("iteration", "validated")):
                raise ValueError("it has no iteration")
            self.model.load_state_dict(state["model"], strict=False)  # it does not contain frozen submodules
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            if hasattr(self.objective, "load_state_dict"):
                self.objective.load_state_dict(state["objective"])
            self.done, self.validated = state["iteration"], state["validated"]
            self.recent.extend(map(float, state["recent_losses"]))
            self.last_good = str(state["last_good"])
        except (OSError, MemoryError, torch.cuda.OutOfMemoryError):  # not a damaged file
            raise
        except Exception:  # damaged files raise exceptions of many types
            raise ValueError(
                f"{file} is damaged or belongs to another network: remove it to start from scratch"
            ) from None
        if invalid := _not_finite({key: state[key] for key in ("model", "optimizer")}):
            raise ValueError(f"{file} has NaN or infinity in {invalid}: remove it to start from scratch")
        return True


def _not_finite(state: Mapping, prefix: str = "") -> str | None:
    """Return the name, such as "model.0.bias", of a tensor in nested dicts that has NaN or infinity."""
    for key, value in state.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            name = _not_finite(value, f"{name}.")
            if name:
                return name
        elif isinstance(value, Tensor) and not value.isfinite().all():
            return name
    return None


def hash_seed(*parts: int) -> int:
    """Return a seed of 64 bits from several numbers."""
    low, high = np.random.SeedSequence(parts).generate_state(2, np.uint32).tolist()
    return low | high << 32
