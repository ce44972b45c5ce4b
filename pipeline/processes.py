"""Sharing images among processes: torchrun's ranks, and the processes a rank starts on its machine.

A step is a generator function `work(names, position, *args)`: it handles its images in order and yields
one `Outcome` after each; what it returns is collected. `position` counts the processes of this machine.
"""

import math
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from queue import Empty
from typing import Any, NamedTuple

from common.files import FULL, DiskFull

PATIENCE = 1.0  # seconds between looks at whether the processes still live


class Outcome(NamedTuple):
    """What became of one image: a failure in one sentence (empty: none), and notes worth counting."""

    name: str
    failure: str = ""
    notes: tuple[str, ...] = ()


Work = Callable[..., Generator[Outcome, None, Any]]


def attempt(name: str, work: Callable[..., Sequence[str] | None], *args) -> Outcome:
    """The outcome of `work(name, *args)`, which returns notes or nothing; its errors fail this image only,
    except that of a full disk, which none after it could escape."""
    try:
        return Outcome(name, notes=tuple(work(name, *args) or ()))
    except DiskFull:
        raise
    except Exception as error:  # one bad image never loses a run, whatever is wrong with it
        if isinstance(error, OSError) and error.errno in FULL:  # where numba keeps compiled code, say
            raise DiskFull(f"{error}: make room, and start again to go on") from None
        return failed(name, error)


def failed(name: str, error: Exception) -> Outcome:
    """The outcome of an image that failed with `error`."""
    kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
    return Outcome(name, failure=kind + " ".join(str(error).split()))


def shard(items: Sequence, rank: int, world: int, block: int = 1) -> list:
    """The items of process `rank` of `world`: every world-th block of items, so that parts differ by one
    block at most. A part may be shared out again by the same blocks."""
    starts = range(rank * block, len(items), world * block)
    return [item for start in starts for item in items[start : start + block]]


def cores() -> int:
    """CPU cores for this process: its part of those that torchrun's ranks on this machine share."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def device_of(device: str, position: int = 0) -> str:
    """Resolve --device for the process at `position` of this machine.

    Args:
        device: "auto" (CUDA where there is any), "cpu", "cuda" (processes take the GPUs in turn) or "cuda:i".
        position: see `Work`.

    Returns:
        "cpu" or "cuda:i".

    Raises:
        ValueError: no such device, or CUDA is asked for and PyTorch finds none.
    """
    import torch  # here, because steps that compute no tensors should not wait for it

    from clip import pick_device

    picked = pick_device(device)
    if picked.type == "cuda" and picked.index is None:
        return f"cuda:{position % torch.cuda.device_count()}"
    return str(picked)


def drain(generator: Generator[Outcome, None, Any], take: Callable[[Outcome], None]) -> Any:
    """Hand each outcome to `take`; returns what the generator returns."""
    while True:
        try:
            outcome = next(generator)
        except StopIteration as stop:
            return stop.value
        take(outcome)


def run(
    work: Work,
    names: Sequence[str],
    args: tuple,
    processes: int,
    take: Callable[[Outcome], None],
    block: int = 1,
) -> list:
    """Do `work(names, position, *args)` in `processes` processes of this machine, `names` shared out.

    Args:
        work: a module-level function; with several processes, `args` are pickled.
        names: image ids.
        args: further arguments of `work`.
        processes: how many; one means this process. Each gets its share of the CPU threads, unless
            OMP_NUM_THREADS says otherwise.
        take: called here with each outcome as it comes.
        block: names that must stay together, see `shard`.

    Returns:
        What each call of `work` returned.

    Raises:
        ValueError, OSError, DiskFull: as `work` raised them in any process.
        ChildProcessError: a process died.
    """
    processes = max(1, min(processes, math.ceil(len(names) / block)))
    first = int(os.environ.get("LOCAL_RANK", 0)) * processes
    if processes == 1:
        return [drain(work(names, first, *args), take)]
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    queue = context.Queue()
    parts = [shard(names, i, processes, block) for i in range(processes)]
    workers = [  # no daemons, which may not have the decoding processes that these may have
        context.Process(target=_child, args=(queue, i, work, part, first + i, args))
        for i, part in enumerate(parts)
    ]
    given = os.environ.get("OMP_NUM_THREADS")
    share = str(max(1, cores() // processes))
    os.environ.setdefault("OMP_NUM_THREADS", share)  # read when a child first loads its libraries
    try:
        for worker in workers:
            worker.start()
        if given is None:
            del os.environ["OMP_NUM_THREADS"]
        return _collect(queue, workers, take)
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.terminate()


def _collect(queue, workers: list, take: Callable[[Outcome], None]) -> list:
    results = {}
    noticed = math.inf  # when a process was first seen dead whose result had not come
    while len(results) < len(workers):
        dead = [w for i, w in enumerate(workers) if i not in results and not w.is_alive()]
        noticed = min(noticed, time.monotonic()) if dead else math.inf
        try:
            message = queue.get(timeout=PATIENCE)
        except Empty:
            message = None  # nothing of the dead is left in the queue
        # The living may go on filling the queue for hours.
        overdue = any(w.exitcode for w in dead) and time.monotonic() > noticed + PATIENCE
        if dead and (message is None or overdue):
            raise ChildProcessError(
                f"a worker process died (exit code {dead[0].exitcode}; -9 often means out of memory); "
                "the same command continues, fewer --num_workers need less memory"
            )
        if message is None:
            continue
        index, kind, value = message
        if kind == "outcome":
            take(value)
        elif kind == "result":
            results[index] = value
        else:
            raise value
    return [results[index] for index in range(len(workers))]


def _child(queue, index: int, work: Work, names: list, position: int, args: tuple) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and ends its children
    parent = multiprocessing.parent_process()

    def take(outcome: Outcome) -> None:
        queue.put((index, "outcome", outcome))
        if not parent.is_alive():  # killed: nobody will continue this run but the next one
            os._exit(1)

    try:
        queue.put((index, "result", drain(work(names, position, *args), take)))
    except (ValueError, OSError) as error:
        kinds = (ValueError, DiskFull, ChildProcessError, OSError)  # others may not survive pickling
        kind = next(kind for kind in kinds if isinstance(error, kind))
        queue.put((index, "error", kind(str(error))))
    except BaseException as error:
        traceback.print_exc(file=sys.stderr)
        told = f"a worker process failed with {type(error).__name__}: {error}"
        queue.put((index, "error", ChildProcessError(told)))
