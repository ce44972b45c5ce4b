"""The engine of every step that runs a network: decode, group into batches, compute, write.

Samples come in *blocks*, and no batch reaches over the end of its block. What is computed together
therefore depends on the blocks alone, never on how many processes share them or which is quicker.

On a CPU several blocks are on their way at once, each in one thread from decoding to writing: cores then
never wait for each other, weights are shared, and results do not depend on how many cores there are. On a
GPU two threads take turns to give it batches, while processes decode the next blocks and threads write the
last. Memory is bounded by the blocks that are on their way, and does not grow with the number of images.
"""

import math
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, Protocol

import torch

from pipeline.processes import Outcome, attempt, failed

GPU_THREADS = 2


class Decoded(Protocol):
    """What decoding makes of a sample.

    Attributes:
        name: image id.
        shape: equal for images that may share a batch.
        cost: batches are cut from images in this order, so that what is padded to the largest in a batch
            (the number of labels, say) differs little.
    """

    name: str
    shape: Hashable
    cost: int


class Step(Protocol):
    """What a flow needs to know of a step; several threads may call at once."""

    def batch_size(self, decoded: Any) -> int:
        """Images like this one that are computed at once when the user gave no number."""

    def compute(self, batch: list) -> list:
        """One result for each decoded image; all have one shape."""

    def write(self, decoded: Any, result: Any) -> Sequence[str] | None:
        """Write one result and return notes worth counting."""


@dataclass(frozen=True)
class FlowSettings:
    """How images flow; no result depends on it, but for rounding on the first two.

    Attributes:
        batch_size: images computed at once; None lets the step choose for each shape.
        look_ahead: images of a block: decoded ahead, and grouped into batches.
        threads: threads that each take blocks from decoding to writing; None: as many as PyTorch would use;
            0: none but the caller's.
        decode_workers: processes that decode; 0: the threads do it themselves.
        write_workers: threads that write; 0: the threads do it themselves.
    """

    batch_size: int | None = None
    look_ahead: int = 1
    threads: int | None = None
    decode_workers: int = 0
    write_workers: int = 0

    def on(self, device: torch.device) -> "FlowSettings":
        """What of it serves on a device: a CPU writes where it computes; of a GPU's two threads one stacks
        and copies a batch while it computes that of the other."""
        if device.type == "cpu":
            return replace(self, write_workers=0)
        return replace(self, threads=self.threads or GPU_THREADS)


def flow(
    samples: Iterable,
    decode: Callable[[Any], Decoded | Outcome],
    step: Step,
    settings: FlowSettings,
    decoder: Executor | None = None,
) -> Generator[Outcome, None, None]:
    """Take every sample through a step.

    A batch that runs out of memory is halved and computed again, and so are the later ones of its
    shape; a batch that fails otherwise is taken apart until only the image that is to blame fails.

    Args:
        samples: names, or whatever `decode` takes.
        decode: sample -> decoded image, or its outcome when there is nothing to compute; raises nothing.
            Pickled when there are decode workers.
        step: see `Step`.
        settings: see there.
        decoder: see `decoding`; for one flow alone there is no need to give it.

    Yields:
        The outcome of every sample, in an order that does not matter.

    Raises:
        ChildProcessError: a decoding process died.
        DiskFull: see `common.files`.
    """
    limits: dict[Hashable, int] = {}  # of shapes that have run out of memory: half the batch that did
    running: deque[Future] = deque()
    writing: deque[Future] = deque()
    threads = torch.get_num_threads() if settings.threads is None else settings.threads
    with ExitStack() as stack:
        decoder = decoder or stack.enter_context(decoding(settings))
        thread, writer = _threads(threads, settings.write_workers, stack)
        for block in _ahead(samples, decode, settings, decoder):
            running.append(thread.submit(_block, block, step, settings.batch_size, limits, writer))
            if len(running) > 2 * threads:
                yield from _finished(running.popleft(), writing)
            while len(writing) > settings.look_ahead:
                yield writing.popleft().result()
        while running:
            yield from _finished(running.popleft(), writing)
        while writing:
            yield writing.popleft().result()


class _Here(Executor):
    """Does everything at once, in the thread that asks."""

    def submit(self, work: Callable, /, *args, **kwargs) -> Future:
        future: Future = Future()
        try:
            future.set_result(work(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def _threads(threads: int, write_workers: int, stack: ExitStack) -> tuple[Executor, Executor]:
    """What runs blocks, and what writes."""
    thread = writer = _Here()
    if threads:
        # Each computes on one core: PyTorch's own threads would wait for each other within every product.
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        thread = ThreadPoolExecutor(threads, "flow", torch.set_num_threads, (1,))
        stack.callback(thread.shutdown, cancel_futures=True)
    if write_workers:
        writer = ThreadPoolExecutor(write_workers, "write")
        stack.callback(writer.shutdown, cancel_futures=True)
    return thread, writer


def _finished(block: Future, writing: deque[Future]) -> Iterator[Outcome]:
    """The outcomes of a block; what is still being written joins the queue."""
    for item in block.result():
        if isinstance(item, Outcome):
            yield item
        else:
            writing.append(item)


# Decoding


@contextmanager
def decoding(settings: FlowSettings) -> Iterator[Executor | None]:
    """The decoding processes of one flow, or of several that follow each other; None where there are none."""
    if not settings.decode_workers:
        yield None
        return
    # Not fork: this process may hold threads, and a CUDA context, by now.
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
    pool = ProcessPoolExecutor(settings.decode_workers, multiprocessing.get_context(method), _decode_only)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _ahead(
    samples: Iterable,
    decode: Callable[[Any], Decoded | Outcome],
    settings: FlowSettings,
    decoder: Executor | None,
) -> Iterator[list[Callable[[], Decoded | Outcome]]]:
    """Blocks of promises: calling one gives the decoded sample, with decode workers those of the next
    blocks are being fulfilled while the caller is busy with one."""
    source = iter(samples)
    blocks = iter(lambda: list(islice(source, settings.look_ahead)), [])
    if decoder is None:
        yield from ([partial(decode, sample) for sample in block] for block in blocks)
        return
    ahead: deque[list] = deque()
    for block in blocks:
        with _death_told():  # also of a process that died over an earlier block
            ahead.append([partial(_result, decoder.submit(decode, sample)) for sample in block])
        if len(ahead) > math.ceil(2 * settings.decode_workers / settings.look_ahead):
            yield ahead.popleft()
    yield from ahead


def _decode_only() -> None:
    """Set up a decoding process: it leaves Ctrl-C to its parent, and does not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def end_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def _result(future: Future) -> Decoded | Outcome:
    with _death_told():
        return future.result()


@contextmanager
def _death_told() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool:
        raise ChildProcessError(
            "a decoding process died (the system may have run out of memory); the same command continues, "
            "fewer --decode_workers or a smaller --look_ahead need less memory"
        ) from None


# Computing


def _block(
    block: list[Callable[[], Decoded | Outcome]],
    step: Step,
    batch_size: int | None,
    limits: dict[Hashable, int],
    writer: Executor,
) -> list[Outcome | Future]:
    """Take one block through the step."""
    outcomes: list[Outcome | Future] = []
    groups: dict[Hashable, list[Decoded]] = {}
    for fulfil in block:
        decoded = fulfil()
        if isinstance(decoded, Outcome):
            outcomes.append(decoded)
        else:
            groups.setdefault(decoded.shape, []).append(decoded)
    for shape, group in groups.items():
        group.sort(key=lambda decoded: -decoded.cost)
        while group:
            size = batch_size or step.batch_size(group[0])
            size = min(size, limits.get(shape, size))
            batch, group = group[:size], group[size:]
            for decoded, result in _computed(batch, step, limits):
                if isinstance(result, Outcome):
                    outcomes.append(result)
                else:
                    outcomes.append(writer.submit(_written, step, decoded, result))
    return outcomes


def _written(step: Step, decoded: Decoded, result: Any) -> Outcome:
    return attempt(decoded.name, lambda name: step.write(decoded, result))


def _computed(
    batch: list[Decoded], step: Step, limits: dict[Hashable, int]
) -> Iterator[tuple[Decoded, Any | Outcome]]:
    """Each image of a batch with its result, or with its outcome if it failed."""
    results, failure, starved = _try(batch, step)
    if failure is None:
        yield from zip(batch, results, strict=True)
        return
    half = len(batch) // 2
    if starved:
        limits[batch[0].shape] = max(1, half)
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
    if half:
        yield from _computed(batch[:half], step, limits)
        yield from _computed(batch[half:], step, limits)
    else:
        yield batch[0], failure


def _try(batch: list[Decoded], step: Step) -> tuple[list, Outcome | None, bool]:
    """Results; or a failure, and whether memory was too small. When this returns the error is gone, and with
    it what its traceback held in memory."""
    try:
        return step.compute(batch), None, False
    except Exception as error:
        starved = _is_out_of_memory(error)
        if starved:
            error = ValueError(f"there is too little memory for an image of shape {batch[0].shape}")
        return [], failed(batch[0].name, error), starved


def _is_out_of_memory(error: Exception) -> bool:
    told = ("allocate memory", "out of memory", "ALLOC_FAILED")  # by PyTorch on a CPU, CUDA and its libraries
    refused = isinstance(error, RuntimeError) and any(words in str(error) for words in told)
    return refused or isinstance(error, MemoryError)
