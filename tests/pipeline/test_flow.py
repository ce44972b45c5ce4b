"""The engine with a step that records its calls: batches, failures, memory, threads."""

import os
import threading
import time
from collections.abc import Hashable
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foundation.files import DiskFull
from pipeline.flow import FlowSettings, _is_out_of_memory, decoding, flow
from pipeline.processes import Outcome, failed
from pipeline.step import Step

OUT_OF_MEMORY = [
    torch.cuda.OutOfMemoryError("CUDA out of memory"),
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 80 bytes"),
]


@dataclass
class Image:
    name: str
    shape: Hashable
    cost: int


def decode(image: Image) -> Image | Outcome:
    """Return the sample itself; the shapes "unreadable" and "deadly" simulate faults."""
    if image.shape == "unreadable":
        return failed(image.name, ValueError("it is unreadable"))
    if image.shape == "deadly":
        Path(image.name).touch()
        os._exit(3)
    return image


class Counting(Step):
    """Records the batches and written results.

    Args:
        fits: shape -> number of images that fit in memory; a larger batch raises `out_of_memory`.
        trouble: ("compute" or "write", image name) -> error to raise.
        auto: default batch size.
        seconds: time that writing takes.
    """

    def __init__(self, fits=None, trouble=None, auto=2, seconds=0.0, out_of_memory=OUT_OF_MEMORY[0]):
        self.fits, self.trouble = fits or {}, trouble or {}
        self.auto, self.seconds, self.out_of_memory = auto, seconds, out_of_memory
        self.tried: list[list[Image]] = []  # batches
        self.batches: list[list[Image]] = []  # successful batches
        self.written: dict[str, str] = {}
        self.threads: set[tuple[str, int]] = set()

    def decoder(self):
        return decode

    def batch_size(self, decoded: Image) -> int:
        return self.auto

    def compute(self, batch: list[Image]) -> list[str]:
        self.threads.add((threading.current_thread().name.split("_")[0], torch.get_num_threads()))
        self.tried.append(batch)
        if len(batch) > self.fits.get(batch[0].shape, len(batch)):
            raise self.out_of_memory
        for image in batch:
            if ("compute", image.name) in self.trouble:
                raise self.trouble["compute", image.name]
        self.batches.append(batch)
        return [f"result of {image.name}" for image in batch]

    def write(self, decoded: Image, result: str) -> list[str]:
        time.sleep(self.seconds)
        if ("write", decoded.name) in self.trouble:
            raise self.trouble["write", decoded.name]
        self.written[decoded.name] = result
        return ["odd"] if decoded.cost % 2 else []


def images(*shapes: Hashable) -> list[Image]:
    return [Image(str(index), shape, index % 5) for index, shape in enumerate(shapes)]


def expected(samples: list[Image]) -> dict[str, Outcome]:
    """Return the expected outcomes if only unreadable samples fail."""
    return {
        image.name: Outcome(image.name, "it is unreadable")
        if image.shape == "unreadable"
        else Outcome(image.name, notes=("odd",) * (image.cost % 2))
        for image in samples
    }


def flow_with(samples, step: Counting, settings: FlowSettings, decode_pool=None):
    step.flow = settings
    return flow(samples, step, decode_pool)


def outcomes(samples: list[Image], step: Counting, settings: FlowSettings) -> dict[str, Outcome]:
    result = list(flow_with(samples, step, settings))
    assert len(result) == len(samples) == len({outcome.name for outcome in result})
    return {outcome.name: outcome for outcome in result}


@given(
    st.lists(st.sampled_from(["a", "b", "c", "unreadable"]), max_size=30),
    st.builds(
        FlowSettings,
        batch_size=st.sampled_from([None, 1, 3, 8]),
        prefetch=st.sampled_from([1, 4, 7, 100]),
        threads=st.sampled_from([0, 1, 3]),
        write_workers=st.sampled_from([0, 2]),
    ),
)
@settings(deadline=None, max_examples=60)
def test_every_sample_has_an_outcome_and_batches_are_from_one_block(shapes, asked):
    samples, step = images(*shapes), Counting()
    assert outcomes(samples, step, asked) == expected(samples)
    good = [image for image in samples if image.shape != "unreadable"]
    assert step.written == {image.name: f"result of {image.name}" for image in good}
    size = asked.batch_size or step.auto
    expected_batches = []  # one block and shape each, highest cost first, all full except the last
    for start in range(0, len(samples), asked.prefetch):
        block = [image for image in samples[start : start + asked.prefetch] if image in good]
        for _, group in groupby(sorted(block, key=lambda image: image.shape), lambda image: image.shape):
            costs = sorted((image.cost for image in group), reverse=True)
            expected_batches += [(start, costs[first : first + size]) for first in range(0, len(costs), size)]
    batches = []
    for batch in step.batches:
        starts = {int(image.name) // asked.prefetch * asked.prefetch for image in batch}
        assert len(starts) == 1 and len({image.shape for image in batch}) == 1
        batches.append((starts.pop(), [image.cost for image in batch]))
    assert sorted(batches) == sorted(expected_batches)


@pytest.mark.parametrize("threads, write_workers", [(0, 2), (3, 0)])
def test_decoding_processes_change_nothing(threads, write_workers):
    samples, step = images(*["a", "b", "unreadable"] * 9), Counting()
    asked = FlowSettings(
        batch_size=3, prefetch=6, threads=threads, decode_workers=2, write_workers=write_workers
    )
    assert outcomes(samples, step, asked) == expected(samples)
    assert sorted(map(len, step.batches)) == [1] * 2 + [2] * 8


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_a_batch_out_of_memory_halves_itself_and_later_batches_of_its_shape(error):
    step = Counting(fits={"large": 3}, out_of_memory=error)
    samples = images(*["large", "small"] * 32)
    result = outcomes(samples, step, FlowSettings(batch_size=8, prefetch=32, threads=0))
    assert result == expected(samples) and len(step.written) == 64
    large = [len(batch) for batch in step.tried if batch[0].shape == "large"]
    assert large == [8, 4, 2, 2, 4, 2, 2] + [2] * 12
    assert [len(batch) for batch in step.tried if batch[0].shape == "small"] == [8] * 4


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_an_image_out_of_memory_fails_with_a_message(error):
    step = Counting(fits={"huge": 0}, out_of_memory=error)
    samples = images("small", "huge", "small")
    result = outcomes(samples, step, FlowSettings(batch_size=2, prefetch=3, threads=1))
    failure = "there is too little memory for an image of shape huge"
    assert result == {**expected(samples), "1": Outcome("1", failure)}


@pytest.mark.parametrize("where", ["compute", "write"])
@pytest.mark.parametrize("threads, write_workers", [(0, 0), (0, 2), (2, 0)])
def test_an_image_that_raises_fails_alone_and_keeps_the_batch_size(where, threads, write_workers):
    step = Counting(trouble={(where, "5"): KeyError("poison")})
    samples = images(*["a"] * 24)
    asked = FlowSettings(batch_size=8, prefetch=8, threads=threads, write_workers=write_workers)
    assert outcomes(samples, step, asked) == {
        **expected(samples),
        "5": Outcome("5", "KeyError: 'poison'"),
    }
    assert len(step.written) == 23
    assert [len(batch) for batch in step.batches].count(8) >= 2


@pytest.mark.parametrize("noticed", ["by its block", "before"])
def test_a_dead_decoding_process_raises_an_error_with_a_cure(noticed, tmp_path):
    samples, step = images(*["a"] * 60), Counting()
    samples[4] = Image(str(tmp_path / "died"), "deadly", 0)

    def source():
        yield from samples[:9]
        while noticed == "before" and not (tmp_path / "died").exists():
            time.sleep(0.05)
        time.sleep(0.5 if noticed == "before" else 0)  # until its parent notices it
        yield from samples[9:]

    asked = FlowSettings(prefetch=3, threads=0 if noticed == "by its block" else 2, decode_workers=2)
    message = r"decoding process died .* run the same command again to continue"
    with pytest.raises(ChildProcessError, match=message):
        list(flow_with(source(), step, asked))
    assert step.written.keys() <= {"0", "1", "2"}


@pytest.mark.parametrize("threads, write_workers", [(0, 0), (0, 2), (2, 0), (2, 2)])
def test_a_full_disk_stops_the_flow(threads, write_workers):
    step = Counting(trouble={("write", "30"): DiskFull("no space is left")})
    samples = images(*["a"] * 1000)
    asked = FlowSettings(batch_size=2, prefetch=4, threads=threads, write_workers=write_workers)
    with pytest.raises(DiskFull, match="no space"):
        list(flow_with(samples, step, asked))
    assert len(step.written) < 100


@pytest.mark.parametrize(
    "threads, decode_workers, write_workers", [(0, 0, 0), (0, 0, 1), (3, 0, 0), (3, 0, 1), (0, 2, 1)]
)
def test_the_number_of_samples_in_progress_is_bounded(threads, decode_workers, write_workers):
    block, drawn, done, most = 4, 0, 0, 0
    samples = images(*["a"] * 300)

    def source():
        nonlocal drawn
        for sample in samples:
            drawn += 1
            yield sample

    asked = FlowSettings(
        prefetch=block, threads=threads, decode_workers=decode_workers, write_workers=write_workers
    )
    step = Counting(seconds=0.001)
    for outcome in flow_with(source(), step, asked):
        most = max(most, drawn - done)
        done += 1
    assert done == 300
    # Blocks: queued for the threads, the last finished one, one that is being written, and one that processes
    # have decoded ahead.
    blocks = 2 * threads + 1 + 1 + (1 if decode_workers else 0)
    assert 2 * threads * block < most <= blocks * block


def test_threads_use_one_core_each_and_the_number_of_threads_is_restored():
    def of_a_new_thread() -> int:
        counts = []
        thread = threading.Thread(target=lambda: counts.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        return counts[0]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        for samples in (images(*"aaaa"), images(*"aaaaaaaaaaaaaaaaaaaaa")):
            step = Counting()
            with closing(flow_with(samples, step, FlowSettings(threads=2))) as flowing:
                for _ in range(4):  # the caller stops before the end
                    next(flowing)
            assert step.threads == {("flow", 1)}
            assert torch.get_num_threads() == of_a_new_thread() == 3
        step = Counting()
        list(flow_with(images(*"aaaa"), step, FlowSettings(threads=0)))
        assert step.threads == {("MainThread", 3)}
        step = Counting(seconds=0.01)
        list(flow_with(images(*"a" * 30), step, FlowSettings()))  # as many threads as PyTorch has
        assert step.threads == {("flow", 1)}
    finally:
        torch.set_num_threads(before)


def test_settings_for_a_device():
    asked = FlowSettings(batch_size=4, threads=5, decode_workers=2, write_workers=3)
    assert asked.on(torch.device("cpu")) == FlowSettings(4, 1, 5, 2, 0)
    assert asked.on(torch.device("cuda")) == asked
    assert FlowSettings().on(torch.device("cuda")).threads == 2  # one copies while the other computes


def test_decoding_processes_are_shared_by_several_flows():
    asked = FlowSettings(prefetch=3, decode_workers=2)
    with decoding(asked) as decode_pool:
        for _ in range(2):
            step = Counting()
            assert len(list(flow_with(images(*"aab"), step, asked, decode_pool))) == 3
        processes = set(decode_pool._processes)
        list(flow_with(images(*"ab"), step, asked, decode_pool))
        assert set(decode_pool._processes) == processes


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_out_of_memory_errors_are_recognized(error):
    assert _is_out_of_memory(error) and not _is_out_of_memory(RuntimeError("shape mismatch"))
