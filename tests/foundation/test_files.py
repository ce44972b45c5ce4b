"""Files appear whole or not at all, also if two processes write them or a writer is killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from foundation.files import replacing, sweep

ROOT = Path(__file__).parents[2]
WRITER = """
import sys, time
from foundation.files import replacing
with replacing(sys.argv[1]) as stream:
    stream.write(b"theirs")
    stream.flush()
    print("open", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def writer(tmp_path):
    """Another process that has written part of a.txt and waits."""
    command = [sys.executable, "-c", WRITER, str(tmp_path / "deep" / "a.txt")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout.readline() == "open\n"
        yield process
        process.kill()


def test_replacing_writes_the_file_only_if_the_block_succeeds(tmp_path):
    file = tmp_path / "deep" / "a.txt"
    with pytest.raises(KeyboardInterrupt), replacing(file) as stream:
        stream.write(b"half")
        raise KeyboardInterrupt
    assert list(file.parent.iterdir()) == []
    with replacing(file) as stream:
        stream.write(b"whole")
        assert not file.exists()
    assert file.read_bytes() == b"whole" and list(file.parent.iterdir()) == [file]


def test_two_processes_can_write_the_same_file(tmp_path, writer):
    file = tmp_path / "deep" / "a.txt"
    with replacing(file) as stream:
        stream.write(b"mine, and longer")
    assert file.read_bytes() == b"mine, and longer"
    writer.communicate("go on\n")
    assert writer.returncode == 0 and file.read_bytes() == b"theirs"
    assert list(file.parent.iterdir()) == [file]


def test_sweep_removes_only_temporary_files_of_killed_processes(tmp_path, writer):
    folder = tmp_path / "deep"
    (temporary,) = folder.iterdir()
    kept = [folder / "notes.tmp", folder / f"a.txt.elsewhere-{writer.pid}.tmp", folder / "a.txt"]
    for file in kept:
        file.touch()
    sweep(tmp_path)
    assert temporary.exists()  # its process still runs
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    sweep(tmp_path)
    assert sorted(folder.iterdir()) == sorted(kept)
