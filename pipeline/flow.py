"""The engine of every step: decode, group into batches, compute, write.

Samples come in *blocks*, and no batch reaches over the end of its block. What is computed together
therefore depends on the blocks alone, not on how many processes divide them or on timing.

On a CPU several blocks are processed at once, each in one thread from decoding to writing, so that cores
never wait for each other. On a GPU two threads take turns to feed it batches, while processes decode the next
blocks and threads write the last. Memory is bounded by the blocks in progress.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any

from common import logs
from pipeline.processes import Decoded, Outcome, attempt, failed

if TYPE_CHECKING:
    import torch

GPU_THREADS = 2


@dataclass(frozen=True)
class FlowSettings:
    """How images flow through a step; the first two may change rounding, nothing else depends on it.

    Attributes:
        batch_size: images computed at once; None lets the step choose for each shape.
        prefetch: images of a block, which are decoded ahead and grouped into batches.
        threads: threads that each take blocks from decoding to writing; None: as many as PyTorch would use;
            0: only the caller's.
        decode_workers: processes that decode; 0: the threads do it themselves.
        write_workers: threads that write; 0: the threads do it themselves.
    """

    batch_size: int | None = None
    prefetch: int = 1
    threads: int | None = None
    decode_workers: int = 0
    write_workers: int = 0

    def on(self, device: torch.device) -> FlowSettings:
        """Return the settings for a device: a CPU writes where it computes; a GPU has two threads, one of
        which stacks and copies a batch while the other's is computed."""
        if device.type == "cpu":
            return replace(self, write_workers=0)
        return replace(self, threads=self.threads or GPU_THREADS)


def flow(
    samples: Iterable, step: Any, decode_pool: Executor | None = None
) -> Generator[Outcome, None, None]:
    """Take every sample through a step.

    A batch that runs out of memory is halved and computed again, and so are later batches of its shape; a
    batch that fails otherwise is divided until only the image that causes it fails.

    Args:
        samples: names, or whatever the step's decoder takes.
        step: see `pipeline.step.Step`; its `flow` says how.
        decode_pool: see `decoding`; for a single flow it need not be given.

    Yields:
        The outcome of every sample, in no particular order.

    Raises:
        ChildProcessError: a decoding process died.
        DiskFull: see `common.files`.
    """
    settings = step.flow
    limits: dict[Hashable, int] = {}  # of shapes that ran out of memory: half the batch that did
    blocks: deque[Future] = deque()
    writing: deque[Future] = deque()
    with _death_explained(), ExitStack() as stack:
        decode_pool = decode_pool or stack.enter_context(decoding(settings))
        threads, computer, writer = _executors(settings, stack)
        decode = partial(_decode, step.decoder())
        for block in _prefetched(samples, decode, settings, decode_pool):
            blocks.append(computer.submit(_block, block, step, limits, writer))
            if len(blocks) > 2 * threads:
                writing.extend(blocks.popleft().result())
            while len(writing) > settings.prefetch:
                yield writing.popleft().result()
        while blocks:
            writing.extend(blocks.popleft().result())
        while writing:
            yield writing.popleft().result()


class _Inline(Executor):
    """Runs work at once, in the calling thread."""

    def submit(self, work: Callable, /, *args, **kwargs) -> Future:
        future: Future = Future()
        try:
            future.set_result(work(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def _executors(settings: FlowSettings, stack: ExitStack) -> tuple[int, Executor, Executor]:
    """Return the number of threads, the executor of blocks, and the executor that writes."""
    computer = writer = _Inline()
    threads = settings.threads
    if threads != 0:
        import torch  # here, because steps without tensors need not wait for the import

        threads = torch.get_num_threads() if threads is None else threads
        # Each computes on one core: PyTorch's own threads would wait for each other within every product.
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        computer = ThreadPoolExecutor(threads, "flow", torch.set_num_threads, (1,))
        stack.callback(computer.shutdown, cancel_futures=True)
    if settings.write_workers:
        writer = ThreadPoolExecutor(settings.write_workers, "write")
        stack.callback(writer.shutdown, cancel_futures=True)
    return threads, computer, writer


# Decoding


def _decode(decode: Callable[[Any], Decoded | Outcome], sample: Any) -> Decoded | Outcome:
    """Decode one sample; an error becomes its outcome."""
    return attempt(getattr(sample, "name", sample), decode, sample)


@contextmanager
def decoding(settings: FlowSettings) -> Iterator[Executor | None]:
    """Start the decoding processes of one flow, or of several in turn; None if there are none."""
    if not settings.decode_workers:
        yield None
        return
    # Not fork: this process may hold threads and a CUDA context.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    context = multiprocessing.get_context(method)
    pool = ProcessPoolExecutor(settings.decode_workers, context, _set_up_decoder, (logs.level(),))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _prefetched(
    samples: Iterable,
    decode: Callable[[Any], Decoded | Outcome],
    settings: FlowSettings,
    decode_pool: Executor | None,
) -> Iterator[list[Callable[[], Decoded | Outcome]]]:
    """Yield blocks of functions that return a decoded sample each. Decoding processes are blocks ahead."""
    source = iter(samples)
    blocks = iter(lambda: list(islice(source, settings.prefetch)), [])
    if decode_pool is None:
        yield from ([partial(decode, sample) for sample in block] for block in blocks)
        return
    ahead: deque[list] = deque()
    for block in blocks:
        ahead.append([decode_pool.submit(decode, sample).result for sample in block])
        if len(ahead) > math.ceil(2 * settings.decode_workers / settings.prefetch):
            yield ahead.popleft()
    yield from ahead


def _set_up_decoder(log_level: int) -> None:
    """Set up a decoding process: it leaves Ctrl-C to its parent and ends with it."""
    logs.show(log_level)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


@contextmanager
def _death_explained() -> Iterator[None]:
    """Raise ChildProcessError where a decoding process died."""
    try:
        yield
    except BrokenProcessPool:
        raise ChildProcessError(
            "a decoding process died (the system may have run out of memory); the same command continues, "
            "fewer --decode_workers or a smaller --prefetch need less memory"
        ) from None


# Computing


def _block(
    block: list[Callable[[], Decoded | Outcome]], step: Any, limits: dict[Hashable, int], writer: Executor
) -> list[Future]:
    """Take one block through the step; return a future outcome for each sample."""
    outcomes: list[Future] = []
    groups: dict[Hashable, list[Decoded]] = {}
    for decode in block:
        decoded = decode()
        if isinstance(decoded, Outcome):
            outcomes.append(_finished(decoded))
        else:
            groups.setdefault(decoded.shape, []).append(decoded)
    for shape, group in groups.items():
        group.sort(key=lambda decoded: -decoded.cost)
        while group:
            size = step.flow.batch_size or step.batch_size(group[0])
            size = min(size, limits.get(shape, size))
            batch, group = group[:size], group[size:]
            for decoded, result in _computed(batch, step, limits):
                if isinstance(result, Outcome):
                    outcomes.append(_finished(result))
                else:
                    outcomes.append(writer.submit(_written, step, decoded, result))
    return outcomes


def _finished(outcome: Outcome) -> Future:
    future: Future = Future()
    future.set_result(outcome)
    return future


def _written(step: Any, decoded: Decoded, result: Any) -> Outcome:
    notes = attempt(decoded.name, step.write, decoded, result)
    return notes if isinstance(notes, Outcome) else Outcome(decoded.name, notes=tuple(notes or ()))


def _computed(
    batch: list[Decoded], step: Any, limits: dict[Hashable, int]
) -> Iterator[tuple[Decoded, Any | Outcome]]:
    """Yield each image of a batch with its result, or with its outcome if it failed."""
    results, failure, out_of_memory = _try(batch, step)
    if failure is None:
        yield from zip(batch, results, strict=True)
        return
    half = len(batch) // 2
    if out_of_memory:
        import torch

        limits[batch[0].shape] = max(1, half)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    if half:
        yield from _computed(batch[:half], step, limits)
        yield from _computed(batch[half:], step, limits)
    else:
        yield batch[0], failure


def _try(batch: list[Decoded], step: Any) -> tuple[list, Outcome | None, bool]:
    """Return results; or a failure, and whether memory ran out. The error itself would hold memory by its
    traceback."""
    try:
        return step.compute(batch), None, False
    except Exception as error:
        out_of_memory = _is_out_of_memory(error)
        if out_of_memory:
            error = ValueError(f"there is too little memory for an image of shape {batch[0].shape}")
        return [], failed(batch[0].name, error), out_of_memory


def _is_out_of_memory(error: Exception) -> bool:
    messages = ("allocate memory", "out of memory", "ALLOC_FAILED")  # PyTorch's, CUDA's and its libraries'
    from_torch = isinstance(error, RuntimeError) and any(words in str(error) for words in messages)
    return from_torch or isinstance(error, MemoryError)
