"""Files appear whole or not at all, also if two processes write them or a writer is killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from foundation.files import below, replacing, sweep, write_file

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


def test_sweep_ignores_temporary_names_that_it_cannot_remove(tmp_path, writer):
    (temporary,) = (tmp_path / "deep").iterdir()
    writer.kill()
    writer.wait()
    temporary.unlink()
    temporary.mkdir()  # unlink raises OSError
    sweep(tmp_path)
    assert temporary.is_dir()


@pytest.mark.parametrize(
    "name, reason",
    [
        ("file/a.txt", "File exists"),
        ("file/deep/a.txt", "Not a directory"),
        ("folder", "Is a directory"),
        ("dangling/a.txt", "File exists"),
        (f"folder/{'x' * 260}", "File name too long"),
    ],
)
def test_file_that_cannot_be_written_is_named_in_one_line(tmp_path, name, reason):
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(OSError) as error:
        write_file(tmp_path / name, "text")
    message = f"{tmp_path / name} cannot be written ({reason}): check its folder, or choose another one"
    assert str(error.value) == message


def test_error_of_the_block_is_not_changed(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"\[Errno 2\] .*nowhere"), replacing(tmp_path / "a.txt"):
        (tmp_path / "nowhere").read_bytes()


def test_longest_file_names_are_written(tmp_path):
    names = ["x" * 255, "y" * 251 + ".png", os.fsdecode(b"caf\xe9.txt")]
    for name in names:
        write_file(tmp_path / name, "text")
    assert {file.name for file in tmp_path.iterdir()} == {*names}


def test_text_that_cannot_be_encoded_is_written_with_escapes(tmp_path):
    write_file(tmp_path / "a.txt", "caf\udce9 caf\u00e9")
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "caf\\udce9 caf\u00e9"


@pytest.mark.parametrize("name", ["/x.png", "../x.png", "a/../../x.png", "a/.."])
def test_outputs_outside_their_folder_are_refused(tmp_path, name):
    assert below(tmp_path, "a/..x.png") == tmp_path / "a" / "..x.png"
    with pytest.raises(ValueError, match="is outside the output folder"):
        below(tmp_path, name)
