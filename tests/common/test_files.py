"""Files that are whole or not there, whoever else writes them, and what killed writers leave."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from common.files import replacing, sweep

ROOT = Path(__file__).parents[2]
WRITER = """
import sys, time
from common.files import replacing
with replacing(sys.argv[1]) as stream:
    stream.write(b"theirs")
    stream.flush()
    print("open", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def writer(tmp_path):
    """Another process in the middle of writing a.txt."""
    command = [sys.executable, "-c", WRITER, str(tmp_path / "deep" / "a.txt")]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout.readline() == "open\n"
        yield process
        process.kill()


def test_a_file_appears_when_the_block_ends_well(tmp_path):
    file = tmp_path / "deep" / "a.txt"
    with pytest.raises(KeyboardInterrupt), replacing(file) as stream:
        stream.write(b"half")
        raise KeyboardInterrupt
    assert list(file.parent.iterdir()) == []
    with replacing(file) as stream:
        stream.write(b"whole")
        assert not file.exists()
    assert file.read_bytes() == b"whole" and list(file.parent.iterdir()) == [file]


def test_two_processes_may_write_the_same_file(tmp_path, writer):
    file = tmp_path / "deep" / "a.txt"
    with replacing(file) as stream:
        stream.write(b"mine, and longer")
    assert file.read_bytes() == b"mine, and longer"
    writer.communicate("go on\n")
    assert writer.returncode == 0 and file.read_bytes() == b"theirs"
    assert list(file.parent.iterdir()) == [file]


def test_what_killed_processes_left_is_swept_and_nothing_else(tmp_path, writer):
    folder = tmp_path / "deep"
    (left,) = folder.iterdir()
    kept = [folder / "notes.tmp", folder / f"a.txt.elsewhere-{writer.pid}.tmp", folder / "a.txt"]
    for file in kept:
        file.touch()
    sweep(tmp_path)
    assert left.exists()  # its process lives
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    sweep(tmp_path)
    assert sorted(folder.iterdir()) == sorted(kept)
