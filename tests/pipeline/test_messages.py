"""Messages of commands: results on stdout, everything else on stderr at the level of -v and -q."""

import logging

import pytest

from foundation import logs
from foundation.cli import Parser
from foundation.logs import log, no_progress
from pipeline.run import Run
from pipeline.step import Decoded, Step


class Fails(Step):
    """Fails on the image "bad"."""

    def decode(self, name: str) -> Decoded:
        return Decoded(name, notes=["odd size"])

    def compute(self, batch: list) -> list:
        if batch[0].name == "bad":
            raise ZeroDivisionError("no pixels")
        return batch

    def write(self, decoded, result) -> list[str]:
        return decoded.notes


def run_with(flags: list[str], num_workers: int = 1) -> int:
    Parser().parse_args(flags)
    run = Run(None)
    run.map(Fails(), ["a", "bad", "c"], num_workers)
    return run.finish()


def test_by_default_the_summary_the_notes_and_the_failures_are_logged(capfd):
    assert run_with([]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert "3 images, 1 failed\nodd size: 2 (a, c)\nfailed: bad: ZeroDivisionError: no pixels\n" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("num_workers", [1, 2])
def test_v_adds_the_traceback_of_each_failure_in_every_process(num_workers, capfd):
    assert run_with(["-v"], num_workers) == 1
    err = capfd.readouterr().err
    assert err.count("Traceback") == 1 and "in compute" in err


def test_q_logs_failures_but_no_summary_of_a_run_without_failures(capfd):
    assert run_with(["--quiet"]) == 1
    assert "failed: bad" in capfd.readouterr().err
    Parser().parse_args(["-q"])
    run = Run(None)
    run.map(Step(), [])
    assert run.finish() == 0
    assert capfd.readouterr().err == ""


def test_q_hides_progress_bars():
    logs.show(logging.INFO)
    assert no_progress() is None and no_progress(hide=True)
    logs.show(logging.WARNING)
    assert no_progress()


def test_v_and_q_leave_nothing_in_the_namespace():
    assert vars(Parser().parse_args(["-v"])) == {}
    assert log.level == logging.DEBUG
