"""Communication between torchrun's processes (ranks), and a context that handles stop signals.

The default process group, gloo, handles values on the CPU; NCCL handles tensors on GPUs.
"""

import atexit
import os
import re
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch takes seconds to import, and some callers never use it
    import torch
    from torch import Tensor

LOST = "another process of torchrun died: run the command again to continue"


class WorkFailed(OSError):
    """Work that has started cannot continue. The cause is not a wrong argument."""


def rank_and_world() -> tuple[int, int]:
    """Return the rank of this process and the number of ranks; (0, 1) without torchrun.

    torchrun sets RANK and WORLD_SIZE. If only one is set, it comes from another program and is ignored.

    Raises:
        ValueError: not a rank below the number of ranks.
    """
    if not (os.environ.get("RANK") and os.environ.get("WORLD_SIZE")):
        return 0, 1
    return _rank_of("RANK", "WORLD_SIZE")


def local_rank_and_world() -> tuple[int, int]:
    """Return the rank of this process on this machine and the number of its ranks, as `rank_and_world`."""
    return (0, 1) if rank_and_world()[1] == 1 else _rank_of("LOCAL_RANK", "LOCAL_WORLD_SIZE")


def _rank_of(rank: str, world: str) -> tuple[int, int]:
    """Return two environment variables as numbers, by default 0 and 1. The rank must be below `world`, unless
    that is not set, as by some launchers."""
    values = [os.environ.get(rank, "0"), os.environ.get(world, "1")]
    numbers = [int(value) if re.fullmatch("[0-9]{1,9}", value) else -1 for value in values]
    if numbers[0] < 0 or numbers[1] < 1 or (numbers[0] >= numbers[1] and world in os.environ):
        raise ValueError(
            f"{rank}={values[0]!r} and {world}={values[1]!r} in the environment: a rank is a number from 0 "
            f"to {world} - 1: unset both, or start the command with torchrun"
        )
    return numbers[0], numbers[1]


def _start() -> None:
    from torch import distributed

    if distributed.is_initialized():
        return
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not address or not port.isdigit():
        raise ValueError(
            f"RANK and WORLD_SIZE in the environment need an address and a port, but MASTER_ADDR={address!r} "
            f"and MASTER_PORT={port!r}: unset RANK and WORLD_SIZE, or start the command with torchrun"
        )
    try:
        distributed.init_process_group("gloo", timeout=timedelta(days=7))  # ranks may finish hours apart
    except (RuntimeError, ValueError) as error:
        raise ChildProcessError(
            f"the processes of torchrun cannot connect to {address}:{port}: {str(error).splitlines()[0]}"
        ) from None
    atexit.register(distributed.destroy_process_group)  # otherwise its threads may crash at exit


def gather(value: Any) -> list:
    """Return the list of all ranks' values, in rank order; blocks until all ranks call it."""
    world = rank_and_world()[1]
    if world == 1:
        return [value]
    from torch import distributed

    _start()
    values = [None] * world
    try:
        distributed.all_gather_object(values, value)
    except RuntimeError as error:  # gloo raises it if a connection is lost
        raise ChildProcessError(LOST) from error
    return values


@contextmanager
def together() -> Iterator[None]:
    """Context whose block fails on all ranks if it raises ValueError or OSError on any rank.

    Rank 0 then raises the error, and the other ranks exit with code 1.
    """
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
    """On ranks other than 0: wait until rank 0 has printed the error and exited, then exit with code 1.

    torchrun terminates all ranks as soon as one exits. Rank 0 prints the error, so it must exit first.
    """
    if rank_and_world()[0]:
        with suppress(ChildProcessError):
            gather(None)
        sys.exit(1)


@contextmanager
def stopping(twice: bool = False) -> Iterator[threading.Event]:
    """Context in which SIGTERM and SIGINT set an event; a second SIGINT raises KeyboardInterrupt.

    Args:
        twice: ignore a second SIGINT. Under torchrun one Ctrl-C arrives twice: from the terminal, and
            forwarded by torchrun.
    """
    event = threading.Event()
    numbers = (signal.SIGTERM, signal.SIGINT)
    in_main = threading.current_thread() is threading.main_thread()  # only the main thread can set handlers
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
    """The ranks that train one network: `rank` is the index of this process, `size` the number of ranks."""

    def __init__(self, device: "torch.device"):
        self.rank, self.size = rank_and_world()
        self.group = None  # process group for tensors on the training device; None: the default group
        if self.size > 1:
            from torch import distributed

            _start()
            if device.type == "cuda":
                self.group = distributed.new_group(backend="nccl")

    def mean(self, values: "Tensor") -> "Tensor":
        """Return the mean over the ranks of a tensor on the CPU or on the training device."""
        return self._reduced(values, "sum") / self.size

    def copy_from_rank_0(self, values: Iterable["Tensor"]) -> None:
        """Overwrite tensors on the training device with the values of rank 0."""
        if self.size > 1:
            from torch import distributed

            for value in values:
                distributed.broadcast(value, 0, self.group)

    def any(self, *flags: bool) -> list[bool]:
        """Return, for each flag, whether it is True on any rank."""
        import torch

        return self._reduced(torch.tensor(flags, dtype=torch.uint8), "max").bool().tolist()

    def _reduced(self, values: "Tensor", operation: str) -> "Tensor":
        if self.size == 1:
            return values
        from torch import distributed

        values, group = values.clone(), self.group if values.is_cuda else None
        try:
            distributed.all_reduce(values, getattr(distributed.ReduceOp, operation.upper()), group)
        except RuntimeError as error:  # a connection is lost
            raise ChildProcessError(LOST) from error
        return values
