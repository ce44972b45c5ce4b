"""The step runner: skips the images that are done; decodes, computes and writes the others."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

from pipeline.flow import FlowSettings, flow
from pipeline.processes import Decoded, Outcome


class Step:
    """Base class of the numbered steps: what a step does with its images, in one process.

    Steps are pickled to worker processes before `start`, so `start` must load the models. Several threads may
    call `compute` and `write` concurrently, except if `flow.threads` is 0.
    """

    flow = FlowSettings(threads=0)
    several = False  # whether a name stands for several images, as a shard does
    retry = "the same command tries them again"  # printed with failures

    def is_done(self, name: str) -> bool:
        """Return whether an earlier run has finished this image."""
        return False

    def done_outcomes(self, name: str) -> Iterable[Outcome]:
        """Return the outcomes to count for a name that is done."""
        return [Outcome(name)]

    def start(self, worker_index: int) -> None:
        """Load models; not called if all images are done. `worker_index`: see `pipeline.processes.run`."""

    def decoder(self) -> Callable[[Any], Decoded | Outcome]:
        """Return the decoding function. It returns the decoded image of a sample, or the image's outcome if
        there is nothing to compute. It may raise. It is pickled if there are decoding processes."""
        return self.decode

    def decode(self, sample: Any) -> Decoded | Outcome:
        raise NotImplementedError

    def batch_size(self, decoded: Any) -> int:
        """Return the default batch size for images of this shape."""
        return 1

    def compute(self, batch: list) -> list:
        """Return one result for each decoded image of a batch; all have the same `shape`."""
        raise NotImplementedError

    def write(self, decoded: Any, result: Any) -> Sequence[str] | None:
        """Write or count one result; return its notes, see `Decoded`."""
        raise NotImplementedError

    def outcomes(self, names: Sequence[str]) -> Iterator[Outcome]:
        """Process the images that are not done; yield their outcomes."""
        yield from flow(names, self)

    def finish(self) -> Any:
        """End the step in this process, also after an error. `Run.map` returns the result of each process."""


def run_step(names: Sequence[str], worker_index: int, step: Step) -> Generator[Outcome, None, Any]:
    """Run a step over images: yield the outcome of each; return the result of `step.finish`."""
    missing = []
    for name in names:
        if step.is_done(name):
            yield from step.done_outcomes(name)
        else:
            missing.append(name)
    try:
        if missing:
            step.start(worker_index)
            yield from step.outcomes(missing)
    finally:
        result = step.finish()
    return result
