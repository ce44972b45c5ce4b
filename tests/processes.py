"""Processes that tests start, signal and wait for.

`Process` is forked from a server that has imported everything once: to torch and to signals it is a process
like any other, and it starts in milliseconds, where a command takes seconds to import torch. `Command` is
what a shell starts, for tests of just that. `here` runs a script without any process.
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
PATIENCE = 120  # seconds until a test gives up
MARK = "STARTED_BY_TEST"  # environment variable: processes and all that they start have a value of their own
CONTEXT = multiprocessing.get_context("forkserver")
# The last is what PyTorch imports when the first optimizer is made.
CONTEXT.set_forkserver_preload(
    ["deeplab.train", "deeplab.test", "deeplab.predict", "pipeline.cams_cli", "pipeline.fused",
     "pipeline.evaluate", "refinement.densecrf_numba", "tests.training_world", "torch._inductor"]
)  # fmt: skip


class Started:
    """A process in a session of its own, with all that it starts."""

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
        """As a terminal does."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def reaches(self, condition: Callable[[], Any]) -> bool:
        """Wait for something that the process does; False if it ends before."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if not self.runs():
                return False
            assert time.monotonic() < deadline, self.printed.read_text()
            time.sleep(0.002)
        return True

    def until(self, condition: Callable[[], Any]) -> None:
        """Wait for something that the process does."""
        assert self.reaches(condition), self.printed.read_text()

    def find(self, *signs: str) -> int | None:
        """The youngest process that this one has started with these in its command or environment."""
        found = [pid for pid, text in self.alive() if all(sign in text for sign in signs)]
        return max(found, default=None)

    def alive(self) -> Iterator[tuple[int, str]]:
        """Processes that this one, itself or indirectly, has started, with their commands and environments.

        Linux only. A forked process is not among them: it has its parent's command and environment.
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
        """Assert that nothing which was started lives on."""
        deadline = time.monotonic() + PATIENCE
        while alive := list(self.alive()):
            assert time.monotonic() < deadline, alive
            time.sleep(0.05)

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), MARK: self.mark}

    def _told(self) -> str:
        told = self.printed.read_text()
        self.printed.unlink()
        return told


class Command(Started):
    """Python as a user starts it from a shell.

    Args:
        words: what follows `python`.
    """

    def __init__(self, *words):
        super().__init__()
        with open(self.printed, "wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, *map(str, words)], cwd=ROOT, env=self._environment(), stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self.pid = self.process.pid
        atexit.register(self.signal_group, signal.SIGKILL)  # should a failing test leave it

    def runs(self) -> bool:
        return self.process.poll() is None

    def end(self) -> tuple[int, str]:
        """Exit code, and what was printed."""
        try:
            return self.process.wait(PATIENCE), self._told()
        finally:
            if not self.runs():  # then its number may soon be another's
                atexit.unregister(self.signal_group)


def torchrun(*words) -> Command:
    """Two ranks of what follows `torchrun`."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", free_port()]
    return Command(*launcher, *words)


class Process(Started):
    """A function in a process of its own; a rank of torchrun's, if `rank` is given.

    Args:
        function: importable by the process, that is, of a package's module or one of those imported above.
        arguments: of the function.
        rank: (rank, number of ranks, port where they meet).
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
        # Should a failing test leave it; it is no daemon, since those cannot start processes.
        atexit.register(self.process.kill)
        sending.close()
        self.pid = self.process.pid

    def runs(self) -> bool:
        return self.process.is_alive()

    def end(self) -> tuple[int, str, Any]:
        """Exit code, what was printed, and what the function returned, None if it did not."""
        assert self.receiving.poll(PATIENCE), self.printed.read_text()
        try:
            returned = self.receiving.recv()
        except EOFError:
            returned = None
        self.process.join(PATIENCE)
        assert not self.process.is_alive(), self.printed.read_text()
        atexit.unregister(self.process.kill)
        return self.process.exitcode, self._told(), returned


def ranks(function: Callable, *arguments, count: int = 2) -> list[Process]:
    """Start a function on several ranks."""
    port = free_port()
    return [Process(function, *arguments, rank=(rank, count, port)) for rank in range(count)]


def free_port() -> int:
    """A port that is nobody's, and until it is bound becomes nobody's: the system hands out higher ones, and
    tests that run beside these take others."""
    beside = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = 20_000 + 500 * (beside % 20)
    for port in random.SystemRandom().sample(range(first, first + 500), 500):
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise OSError("no port is free")


def script(*words) -> None:
    """What `python file ...` or `python -m module ...` does, but for starting Python.

    Raises:
        SystemExit: as the script does.
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
    """Exit code, stdout and stderr of a `script` in this process."""
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
        atexit._run_exitfuncs()  # which only processes that Python itself started do
