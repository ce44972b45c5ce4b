"""Processes that tests start, signal and wait for.

`Process` is forked from a server that has already imported all modules, so it starts in milliseconds; a
command needs seconds to import torch. Otherwise it behaves like any process. `Command` starts Python as a
shell does. `here` runs a script in the process of the test.
"""

import atexit
import multiprocessing
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

ROOT = Path(__file__).parents[1]
PATIENCE = 120  # seconds that a test waits before it fails
MARK = "STARTED_BY_TEST"  # environment variable that identifies a process and all processes that it starts
CONTEXT = multiprocessing.get_context("forkserver")
# PyTorch imports torch._inductor when the first optimizer is created.
CONTEXT.set_forkserver_preload(
    ["deeplab.train", "deeplab.test", "deeplab.predict", "pipeline.cams_cli", "pipeline.fused",
     "pipeline.evaluate", "refinement.densecrf_numba", "tests.training_world", "torch._inductor"]
)  # fmt: skip


class Started:
    """A process in its own session, and all processes that it starts."""

    def __init__(self):
        self.mark = f"{os.getpid()}_{time.monotonic_ns()}"
        file, name = tempfile.mkstemp()
        os.close(file)
        self.printed, self.pid = Path(name), 0

    def runs(self) -> bool:
        raise NotImplementedError

    def signal(self, number: int) -> None:
        with suppress(ProcessLookupError):  # it has ended
            os.kill(self.pid, number)

    def signal_group(self, number: int) -> None:
        """Signal the process group, as a terminal does."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def reaches(self, condition: Callable[[], Any]) -> bool:
        """Wait until `condition` is true; return False if the process ends first."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if not self.runs():
                return False
            assert time.monotonic() < deadline, self.printed.read_text()
            time.sleep(0.002)
        return True

    def until(self, condition: Callable[[], Any]) -> None:
        """Wait until `condition` is true; fail if the process ends first."""
        assert self.reaches(condition), self.printed.read_text()

    def find(self, *signs: str) -> int | None:
        """Return the youngest started process with all `signs` in its command or environment, or None."""
        return max((pid for pid, text in self.alive() if all(sign in text for sign in signs)), default=None)

    def alive(self) -> Iterator[tuple[int, str]]:
        """Yield (id, command and environment) of all processes that this one has started, also indirectly.

        Linux only. Forked processes are not included, because they show the environment of their parent.
        """
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                environment = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
                line = (folder / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
                state = (folder / "stat").read_text().rsplit(")", 1)[1].split()[0]
            except OSError:
                continue
            if f"{MARK}={self.mark}" in environment and state != "Z":
                yield int(folder.name), line + "\n" + "\n".join(environment)

    def gone(self) -> None:
        """Assert that all started processes end."""
        deadline = time.monotonic() + PATIENCE
        while alive := list(self.alive()):
            assert time.monotonic() < deadline, alive
            time.sleep(0.05)

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), MARK: self.mark}

    def _output(self) -> str:
        output = self.printed.read_text()
        self.printed.unlink()
        return output


class Command(Started):
    """A Python command, started as from a shell.

    Args:
        words: arguments of `python`.
    """

    def __init__(self, *words):
        super().__init__()
        with open(self.printed, "wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, *map(str, words)], cwd=ROOT, env=self._environment(), stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self.pid = self.process.pid
        atexit.register(self.signal_group, signal.SIGKILL)  # for failing tests, which do not end it

    def runs(self) -> bool:
        return self.process.poll() is None

    def end(self) -> tuple[int, str]:
        """Return the exit code and the output."""
        try:
            return self.process.wait(PATIENCE), self._output()
        finally:
            if not self.runs():  # the system may give its id to another process
                atexit.unregister(self.signal_group)


def torchrun(*words) -> Command:
    """Start torchrun with two ranks; `words` are its further arguments."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", free_port()]
    return Command(*launcher, *words)


class Process(Started):
    """A function that runs in its own process, as a rank of torchrun if `rank` is given.

    Args:
        function: function that the process can import.
        arguments: arguments of the function.
        rank: (rank, number of ranks, port of the rendezvous).
    """

    def __init__(self, function: Callable, *arguments, rank: tuple[int, int, int] | None = None):
        super().__init__()
        environment = self._environment()
        if rank:
            number, world, port = map(str, rank)
            environment |= {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": world}
            environment |= {"LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self.receiving, sending = CONTEXT.Pipe(duplex=False)
        work = (function, arguments, environment, self.printed, sending)
        self.process = CONTEXT.Process(target=_child, args=work)
        self.process.start()
        # For failing tests, which do not end it. A daemon process could not start processes itself.
        atexit.register(self.process.kill)
        sending.close()
        self.pid = self.process.pid

    def runs(self) -> bool:
        return self.process.is_alive()

    def end(self) -> tuple[int, str, Any]:
        """Return the exit code, the output, and the function's return value (None if it did not return)."""
        assert self.receiving.poll(PATIENCE), self.printed.read_text()
        try:
            returned = self.receiving.recv()
        except EOFError:
            returned = None
        self.process.join(PATIENCE)
        assert not self.process.is_alive(), self.printed.read_text()
        atexit.unregister(self.process.kill)
        return self.process.exitcode, self._output(), returned


def ranks(function: Callable, *arguments, count: int = 2) -> list[Process]:
    """Start a function in several processes, as the ranks of torchrun."""
    port = free_port()
    return [Process(function, *arguments, rank=(rank, count, port)) for rank in range(count)]


def free_port() -> int:
    """Return a free port that stays free until the test binds it: the system assigns higher ports, and each
    parallel test process uses another range."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = 20_000 + 500 * (worker % 20)
    for port in random.SystemRandom().sample(range(first, first + 500), 500):
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise OSError("no port is free")


def script(*words) -> None:
    """Do what `python file ...` or `python -m module ...` does, in this process.

    Raises:
        SystemExit: the script exits.
    """
    name, *rest = map(str, words)
    if name == "-m":
        name, *rest = rest
    with patch.object(sys, "argv", [name, *rest]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)  # imported before
        if words[0] == "-m":
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(str(ROOT / name), run_name="__main__")


def here(*words) -> tuple[int, str, str]:
    """Run a `script` in this process; return its exit code, stdout and stderr."""
    with redirect_stdout(StringIO()) as output, redirect_stderr(StringIO()) as errors:
        try:
            script(*words)
            code = 0
        except SystemExit as end:
            code = end.code or 0
    return code, output.getvalue(), errors.getvalue()


def _child(function: Callable, arguments: tuple, environment: dict, printed: Path, sending) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    stream = os.open(printed, os.O_WRONLY | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    torch.set_num_threads(1)
    try:
        sending.send(function(*arguments))
    finally:
        sys.stdout.flush()
        atexit._run_exitfuncs()  # processes of multiprocessing do not run them
