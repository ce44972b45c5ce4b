"""The engine of every step: decode samples, group them into batches, compute, write.

Samples are divided into *blocks*, and a batch contains samples of one block only. The batches therefore
depend only on the blocks, not on the number of processes or on timing.

On a CPU several blocks are processed in parallel. One thread processes a whole block, from decoding to
writing, so that cores do not wait for each other. On a GPU two threads alternate in computing batches, while
processes decode the next blocks and threads write the previous results. Only the blocks in progress are in
memory.
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

from foundation import logs
from pipeline.processes import Decoded, Outcome, attempt, failed

if TYPE_CHECKING:
    import torch

GPU_THREADS = 2


@dataclass(frozen=True)
class FlowSettings:
    """Batch size, block size and parallelism of a step. `batch_size` and `prefetch` may change the rounding
    of results; the other settings do not affect results.

    Attributes:
        batch_size: images per batch; None uses `Step.batch_size`, which depends on the image's shape.
        prefetch: images per block; a block is decoded ahead and grouped into batches.
        threads: number of threads; each thread processes whole blocks. None: as many as PyTorch uses. 0:
            only the calling thread.
        decode_workers: number of decoding processes; 0: the threads decode.
        write_workers: number of writing threads; 0: the threads write.
    """

    batch_size: int | None = None
    prefetch: int = 1
    threads: int | None = None
    decode_workers: int = 0
    write_workers: int = 0

    def on(self, device: torch.device) -> FlowSettings:
        """Return the settings for a device. On a CPU, the computing threads also write. On a GPU, there are
        two threads by default: while the GPU computes the batch of one thread, the other thread stacks and
        copies the next batch."""
        if device.type == "cpu":
            return replace(self, write_workers=0)
        return replace(self, threads=self.threads or GPU_THREADS)


def flow(
    samples: Iterable, step: Any, decode_pool: Executor | None = None
) -> Generator[Outcome, None, None]:
    """Process every sample with a step, and yield its outcome.

    If a batch runs out of memory, its halves are computed instead, and later batches of its shape have at
    most half its size. If a batch fails for another reason, it is divided until only the image that causes
    the error fails.

    Args:
        samples: image names, or other arguments of the step's decoder.
        step: see `pipeline.step.Step`; `step.flow` are the settings.
        decode_pool: decoding processes, see `decoding`; None: this function starts and stops them.

    Yields:
        The outcome of every sample, in no particular order.

    Raises:
        ChildProcessError: a decoding process died.
        DiskFull: see `foundation.files`.
    """
    settings = step.flow
    limits: dict[Hashable, int] = {}  # shape that ran out of memory -> largest batch to try
    blocks: deque[Future] = deque()
    writing: deque[Future] = deque()
    with _explain_dead_decoder(), ExitStack() as stack:
        decode_pool = decode_pool or stack.enter_context(decoding(settings))
        threads, computer, writer = _executors(settings, stack)
        decode = partial(_decode, step.decoder())
        for block in _prefetched(samples, decode, settings, decode_pool):
            blocks.append(computer.submit(_process_block, block, step, limits, writer))
            if len(blocks) > 2 * threads:
                writing.extend(blocks.popleft().result())
            while len(writing) > settings.prefetch:
                yield writing.popleft().result()
        while blocks:
            writing.extend(blocks.popleft().result())
        while writing:
            yield writing.popleft().result()


class _Inline(Executor):
    """Runs work immediately, in the calling thread."""

    def submit(self, work: Callable, /, *args, **kwargs) -> Future:
        future: Future = Future()
        try:
            future.set_result(work(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def _executors(settings: FlowSettings, stack: ExitStack) -> tuple[int, Executor, Executor]:
    """Return the number of threads, the executor for blocks, and the executor for writing."""
    computer = writer = _Inline()
    threads = settings.threads
    if threads != 0:
        import torch  # here, because steps without tensors do not need this slow import

        threads = torch.get_num_threads() if threads is None else threads
        # Each thread uses one core: PyTorch's own threads would synchronize in every matrix product.
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
    """Start the decoding processes for one or several successive flows; None if `decode_workers` is 0."""
    if not settings.decode_workers:
        yield None
        return
    # Not fork: it is unsafe in a process with threads or a CUDA context.
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
    """Yield blocks of functions; each function returns one decoded sample. Decoding processes, if there are
    any, decode several blocks ahead."""
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
    """Set up a decoding process: it ignores Ctrl-C and exits when its parent exits."""
    logs.show(log_level)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


@contextmanager
def _explain_dead_decoder() -> Iterator[None]:
    """Raise ChildProcessError with an explanation if a decoding process dies."""
    try:
        yield
    except BrokenProcessPool:
        raise ChildProcessError(
            "a decoding process died (the system may have run out of memory): run the same command again to "
            "continue; fewer --decode_workers or a smaller --prefetch need less memory"
        ) from None


# Computing


def _process_block(
    block: list[Callable[[], Decoded | Outcome]], step: Any, limits: dict[Hashable, int], writer: Executor
) -> list[Future]:
    """Process one block with the step; return the future outcome of each sample."""
    outcomes: list[Future] = []
    groups: dict[Hashable, list[Decoded]] = {}
    for decode in block:
        decoded = decode()
        if isinstance(decoded, Outcome):
            outcomes.append(_completed(decoded))
        else:
            groups.setdefault(decoded.shape, []).append(decoded)
    for shape, group in groups.items():
        group.sort(key=lambda decoded: -decoded.cost)
        while group:
            size = step.flow.batch_size or step.batch_size(group[0])
            size = min(size, limits.get(shape, size))
            batch, group = group[:size], group[size:]
            for decoded, result in _compute_batch(batch, step, limits):
                if isinstance(result, Outcome):
                    outcomes.append(_completed(result))
                else:
                    outcomes.append(writer.submit(_write_result, step, decoded, result))
    return outcomes


def _completed(outcome: Outcome) -> Future:
    future: Future = Future()
    future.set_result(outcome)
    return future


def _write_result(step: Any, decoded: Decoded, result: Any) -> Outcome:
    notes = attempt(decoded.name, step.write, decoded, result)
    return notes if isinstance(notes, Outcome) else Outcome(decoded.name, notes=tuple(notes or ()))


def _compute_batch(
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
        yield from _compute_batch(batch[:half], step, limits)
        yield from _compute_batch(batch[half:], step, limits)
    else:
        yield batch[0], failure


def _try(batch: list[Decoded], step: Any) -> tuple[list, Outcome | None, bool]:
    """Return the results, or the failed outcome and whether memory ran out. The exception itself is not
    returned, because its traceback keeps tensors in memory."""
    try:
        return step.compute(batch), None, False
    except Exception as error:
        out_of_memory = _is_out_of_memory(error)
        if out_of_memory:
            error = ValueError(f"there is too little memory for an image of shape {batch[0].shape}")
        return [], failed(batch[0].name, error), out_of_memory


def _is_out_of_memory(error: Exception) -> bool:
    messages = ("allocate memory", "out of memory", "ALLOC_FAILED")  # of PyTorch, CUDA and CUDA libraries
    from_torch = isinstance(error, RuntimeError) and any(words in str(error) for words in messages)
    return from_torch or isinstance(error, MemoryError)
