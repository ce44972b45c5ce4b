"""The step runner: skips the images that are done, takes the others through decode, compute and write."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

from pipeline.flow import FlowSettings, flow
from pipeline.processes import Decoded, Outcome


class Step:
    """What a numbered step does with its images, in one process.

    Steps are pickled to worker processes before `start`, so models are loaded there. Several threads may call
    `compute` and `write` at once, except with `flow.threads` 0.
    """

    flow = FlowSettings(threads=0)
    several = False  # whether a name stands for several images
    retry = "the same command tries them again"  # printed with failures

    def is_done(self, name: str) -> bool:
        """Return whether an earlier run has finished this image."""
        return False

    def done_outcomes(self, name: str) -> Iterable[Outcome]:
        """Return what is counted for a name that is done."""
        return [Outcome(name)]

    def start(self, worker_index: int) -> None:
        """Load models; not called when everything is done. `worker_index`: see `pipeline.processes.run`."""

    def decoder(self) -> Callable[[Any], Decoded | Outcome]:
        """Return the function sample -> decoded image, or its outcome when nothing is left to compute. It may
        raise; it is pickled when there are decoding processes."""
        return self.decode

    def decode(self, sample: Any) -> Decoded | Outcome:
        raise NotImplementedError

    def batch_size(self, decoded: Any) -> int:
        """Return how many images like this one are computed at once when the user gives no number."""
        return 1

    def compute(self, batch: list) -> list:
        """Return one result for each decoded image; all have one shape."""
        raise NotImplementedError

    def write(self, decoded: Any, result: Any) -> Sequence[str] | None:
        """Write or count one result; return notes, see `Decoded`."""
        raise NotImplementedError

    def outcomes(self, names: Sequence[str]) -> Iterator[Outcome]:
        """Take images that are not done through the step."""
        yield from flow(names, self)

    def finish(self) -> Any:
        """End the step in this process, also after an error; what is returned reaches `Run.map`."""


def run_step(names: Sequence[str], worker_index: int, step: Step) -> Generator[Outcome, None, Any]:
    """Run a step over images: yield one outcome for each, return what `step.finish` returns."""
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
