"""Divides images among processes: torchrun's ranks, and the processes that each rank starts."""

import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Generator, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, ClassVar, NamedTuple

from foundation import logs
from foundation.files import FULL, DiskFull
from foundation.logs import log
from segmentation.distributed import local_rank_and_world


@dataclass
class Decoded:
    """A decoded sample; base class of the samples of all steps.

    Attributes:
        name: image id.
        notes: remarks that the run counts, such as "images shrunk to ...".
        shape: images of equal shape may share a batch.
        cost: images are batched in descending order of this number, such as the number of labels, so that
            padding to the largest image of a batch wastes little.
    """

    name: str
    notes: list[str] = field(default_factory=list, kw_only=True)
    shape: ClassVar[Hashable] = None
    cost: ClassVar[int] = 0


class Outcome(NamedTuple):
    """The outcome of one image: its failure in one line (empty: none), and its notes."""

    name: str
    failure: str = ""
    notes: tuple[str, ...] = ()


def attempt(name: str, work: Callable[..., Any], *args) -> Any:
    """Return `work(*args)`, or the failed outcome of image `name` if it raises; see `failed`."""
    try:
        return work(*args)
    except Exception as error:  # one bad image never ends a run
        return failed(name, error)


def failed(name: str, error: Exception) -> Outcome:
    """Return the outcome of an image that failed with `error`.

    Raises:
        DiskFull: the disk is full, so all later images would fail too.
    """
    if isinstance(error, DiskFull):
        raise error
    if isinstance(error, OSError) and error.errno in FULL:  # numba's cache of compiled code, for example
        raise DiskFull(f"{error}: free disk space and run the same command again") from None
    log.debug("traceback of the failure of %s", name, exc_info=error)
    kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
    return Outcome(name, failure=kind + " ".join(str(error).split()))


def part_of(items: Sequence, index: int, count: int, block: int = 1) -> list:
    """Return the items of process `index` of `count`: every count-th block of items. A part can be divided
    again into the same blocks."""
    starts = range(index * block, len(items), count * block)
    return [item for start in starts for item in items[start : start + block]]


def cores() -> int:
    """Return the number of CPU cores for this process: torchrun's ranks on one machine share its cores."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // local_rank_and_world()[1])


def device_of(device: str, worker_index: int = 0) -> str:
    """Return the device of one process, "cpu" or "cuda:i".

    Args:
        device: "auto" (CUDA if available), "cpu", "cuda" (processes are divided among the GPUs) or "cuda:i".
        worker_index: number of the process on this machine.

    Raises:
        ValueError: no such device, or PyTorch finds no GPU.
    """
    import torch  # imported here: steps without tensors do not need it

    from clip import pick_device

    resolved = pick_device(device)
    if resolved.type == "cuda" and resolved.index is None:
        return f"cuda:{worker_index % torch.cuda.device_count()}"
    return str(resolved)


def drain(generator: Generator[Outcome, None, Any], take: Callable[[Outcome], None]) -> Any:
    """Call `take` with each outcome of a generator; return the generator's return value."""
    while True:
        try:
            outcome = next(generator)
        except StopIteration as stop:
            return stop.value
        take(outcome)


def run(
    work: Callable,
    names: Sequence[str],
    args: tuple,
    processes: int,
    take: Callable[[Outcome], None],
    block: int = 1,
) -> list:
    """Run `work(names, worker_index, *args)` in several processes of this machine, which divide `names`.

    Args:
        work: a module-level generator function that yields an `Outcome` for each name. `worker_index` is the
            number of the process on this machine. With several processes, `args` are pickled.
        processes: 1 uses this process. Several divide the CPU threads among them, unless OMP_NUM_THREADS is
            set.
        take: called in this process with each outcome.
        block: number of consecutive names that one process gets, see `part_of`.

    Returns:
        The return value of each call of `work`.

    Raises:
        ValueError, OSError, DiskFull: as `work` raised them in any process.
        ChildProcessError: a process died.
    """
    processes = max(1, min(processes, math.ceil(len(names) / block)))
    first = local_rank_and_world()[0] * processes
    if processes == 1:
        return [drain(work(names, first, *args), take)]
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    workers: dict[Connection, BaseProcess] = {}
    results: dict[Connection, Any] = {}
    threads_are_set = "OMP_NUM_THREADS" in os.environ
    # Workers read this variable when they load their libraries.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // processes)))
    try:
        for index in range(processes):
            receiver, sender = context.Pipe(duplex=False)
            part = part_of(names, index, processes, block)
            # Not a daemon: a daemon process may not start decoding processes.
            options = sender, work, part, first + index, args, logs.level()
            worker = context.Process(target=_worker, args=options)
            worker.start()
            sender.close()  # only the worker keeps it open, so the pipe ends when the worker dies
            workers[receiver] = worker
        if not threads_are_set:
            del os.environ["OMP_NUM_THREADS"]
        while len(results) < processes:
            for receiver in wait(workers.keys() - results.keys()):
                kind, value = _receive(receiver, workers[receiver])
                if kind == "outcome":
                    take(value)
                elif kind == "result":
                    results[receiver] = value
                else:
                    raise value
        return [results[receiver] for receiver in workers]
    finally:
        for worker in workers.values():
            worker.terminate()


def _receive(receiver: Connection, worker: BaseProcess) -> tuple[str, Any]:
    """Return the next message of a worker, see `_worker`; ChildProcessError if it died."""
    try:
        return receiver.recv()
    except (EOFError, OSError):  # OSError: it died within a message
        worker.join()
        raise ChildProcessError(
            f"a worker process died (exit code {worker.exitcode}; -9 often means out of memory); "
            "the same command continues; fewer --num_workers need less memory"
        ) from None


def _worker(
    sender: Connection, work: Callable, names: list, worker_index: int, args: tuple, log_level: int
) -> None:
    """Send ("outcome", Outcome) for each image, then ("result", what `work` returned) or ("error", error)."""
    logs.show(log_level)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C and terminates its workers

    def send(kind: str, value: Any) -> None:
        try:
            sender.send((kind, value))
        except BrokenPipeError:  # the parent was killed
            os._exit(1)

    try:
        send("result", drain(work(names, worker_index, *args), partial(send, "outcome")))
    except (ValueError, OSError) as error:
        kinds = (ValueError, DiskFull, ChildProcessError, OSError)  # other types may not be picklable
        kind = next(kind for kind in kinds if isinstance(error, kind))
        send("error", kind(str(error)))
    except BaseException as error:
        log.error("a worker process failed", exc_info=True)
        send("error", ChildProcessError(f"a worker process failed with {type(error).__name__}: {error}"))
