"""Processes that work together: torchrun's ranks, what they exchange, and the signals that stop them.

The default group is gloo's, for numbers and objects of the CPU; tensors on GPUs are summed by NCCL.
"""

import atexit
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # steps that compute no tensors should not wait for torch
    import torch
    from torch import Tensor


LOST = "another of torchrun's processes died: start again to go on"


class WorkFailed(OSError):
    """Work that had begun cannot go on; the command line was right."""


def rank_and_world() -> tuple[int, int]:
    """Return this process's rank and the number of ranks under torchrun; (0, 1) without torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def _start() -> None:
    from torch import distributed

    if not distributed.is_initialized():
        distributed.init_process_group("gloo", timeout=timedelta(days=7))  # ranks may finish hours apart
        atexit.register(distributed.destroy_process_group)  # else its threads may abort the exit


def gather(value: Any) -> list:
    """Return `value` of every torchrun rank, in rank order; waits until all ranks call it."""
    world = rank_and_world()[1]
    if world == 1:
        return [value]
    from torch import distributed

    _start()
    values = [None] * world
    try:
        distributed.all_gather_object(values, value)
    except RuntimeError as error:  # gloo's: a connection broke
        raise ChildProcessError(LOST) from error
    return values


@contextmanager
def together() -> Iterator[None]:
    """Context of a block that fails on all ranks if it fails on any; rank 0 raises ValueError or OSError."""
    failure = None
    try:
        yield
    except (ValueError, OSError) as error:
        failure = error
    failure = next(filter(None, gather(failure)), None)
    if failure is not None:
        exit_after_rank_0()
        raise failure


def exit_after_rank_0() -> None:
    """On other ranks than 0: wait until rank 0 has printed the error and exited, then exit with 1.

    torchrun ends all others as soon as one exits, and rank 0 must get to print the error.
    """
    if rank_and_world()[0]:
        with suppress(ChildProcessError):
            gather(None)
        sys.exit(1)


@contextmanager
def stopping(twice: bool = False) -> Iterator[threading.Event]:
    """Context in which SIGTERM and SIGINT set an event; a second SIGINT interrupts at once.

    Args:
        twice: each signal may arrive twice, as under torchrun, which passes on a Ctrl-C that its processes
            got from the terminal already; a second SIGINT then does nothing more.
    """
    event = threading.Event()
    numbers = (signal.SIGTERM, signal.SIGINT)
    in_main = threading.current_thread() is threading.main_thread()  # only there may handlers be set
    previous = {number: signal.getsignal(number) for number in numbers} if in_main else {}

    def stop(number, _):
        event.set()
        if number == signal.SIGINT and not twice:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    for number in previous:
        signal.signal(number, stop)
    try:
        yield event
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class World:
    """The ranks that train one network: this rank's number, and sums over all ranks."""

    def __init__(self, device: "torch.device"):
        self.rank, self.size = rank_and_world()
        self.group = None  # gloo's
        if self.size > 1:
            from torch import distributed

            _start()
            if device.type == "cuda":
                self.group = distributed.new_group(backend="nccl")

    def total(self, values: "Tensor") -> "Tensor":
        """Return the sum of `values` over the ranks; tensors on the training device."""
        return self._reduced(values, "sum", self.group)

    def global_count(self, counts: "Tensor") -> "Tensor":
        """Return `counts` (n,) summed over the ranks, divided by the number of ranks.

        If each rank divides its sums by it, the mean over the ranks, to which gradients are averaged, is the
        sum of all ranks / the count of all ranks.
        """
        return self.total(counts) / self.size

    def same(self, values: Iterable["Tensor"]) -> None:
        """Overwrite tensors on the training device with those of rank 0."""
        if self.size > 1:
            from torch import distributed

            for value in values:
                distributed.broadcast(value, 0, self.group)

    def mean(self, values: "Tensor") -> "Tensor":
        """Return the mean over the ranks; CPU tensors."""
        return self._reduced(values, "sum") / self.size

    def any(self, *flags: bool) -> list[bool]:
        """Return, for each flag, whether it is set on any rank."""
        import torch

        return self._reduced(torch.tensor(flags, dtype=torch.uint8), "max").bool().tolist()

    def _reduced(self, values: "Tensor", operation: str, group: Any = None) -> "Tensor":
        if self.size == 1:
            return values
        from torch import distributed

        values = values.clone()
        try:
            distributed.all_reduce(values, getattr(distributed.ReduceOp, operation.upper()), group)
        except RuntimeError as error:  # a connection broke
            raise ChildProcessError(LOST) from error
        return values
