"""Processes that work together: torchrun's ranks, and what they tell each other.

The default group is gloo's, for numbers and objects of the CPU; tensors on GPUs are summed by NCCL.
"""

import atexit
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # steps that compute no tensors should not wait for torch
    import torch
    from torch import Tensor


LOST = "another of torchrun's processes died: start again to go on"


class WorkFailed(OSError):
    """Work that had begun cannot go on, through no mistake on the command line."""


def rank_and_world() -> tuple[int, int]:
    """This process among those torchrun started; (0, 1) without torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def _start() -> None:
    from torch import distributed

    if not distributed.is_initialized():
        distributed.init_process_group("gloo", timeout=timedelta(days=7))  # ranks may finish hours apart
        atexit.register(distributed.destroy_process_group)  # or its threads may abort the exit


def gather(value: Any) -> list:
    """`value` of every torchrun rank, in rank order; waits until all have come this far."""
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
    """A block that fails on all ranks if it fails on any, with a ValueError or OSError that rank 0 raises."""
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
    """On other ranks than 0: wait until that one has told what is wrong and has left, then exit with 1.

    The first to leave makes torchrun end the others, of which rank 0 must not be one.
    """
    if rank_and_world()[0]:
        with suppress(ChildProcessError):
            gather(None)
        sys.exit(1)


class World:
    """The ranks that train one network: who this one is, and sums over all of them."""

    def __init__(self, device: "torch.device"):
        self.rank, self.size = rank_and_world()
        self.group = None  # gloo's
        if self.size > 1:
            from torch import distributed

            _start()
            if device.type == "cuda":
                self.group = distributed.new_group(backend="nccl")

    def total(self, values: "Tensor") -> "Tensor":
        """The sum of `values` over the ranks, the same tensor on all of them; on the training device."""
        return self._reduced(values, "sum", self.group)

    def share(self, counts: "Tensor") -> "Tensor":
        """What a rank divides its sums by, so that the mean over the ranks (which is what gradients are
        averaged to) is the sum of all over the count of all: `counts` (n,) summed, over the ranks."""
        return self.total(counts) / self.size

    def same(self, values: Iterable["Tensor"]) -> None:
        """Overwrite tensors on the training device with those of rank 0."""
        if self.size > 1:
            from torch import distributed

            for value in values:
                distributed.broadcast(value, 0, self.group)

    def mean(self, values: "Tensor") -> "Tensor":
        """The mean of CPU numbers over the ranks."""
        return self._reduced(values, "sum") / self.size

    def any(self, *flags: bool) -> list[bool]:
        """Whether each flag is set on any rank."""
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
