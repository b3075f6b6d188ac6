"""If a write fails, an `OSError` names the file and a remedy, and the old files stay."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from folders import contents, limited
from writers import FILES, FOLDERS, WRITERS, Writer, all_writers, calls, readable

from llama_fn.checkpoint.atomic import replacing
from llama_fn.cli import main


@pytest.fixture(scope="module")
def writers(texts, tmp_path_factory) -> dict[str, Writer]:
    return all_writers(texts, tmp_path_factory.mktemp("metrics"))


@pytest.mark.parametrize("there", [False, True], ids=["new", "over another"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_write_that_fails_anywhere_names_the_file_and_leaves_what_was_there(writers, tmp_path, monkeypatch,
                                                                              name, there):
    """For every n, the n-th system call fails. Either the old files or the new ones are then complete.

    Only a failing hard link is not an error, because some file systems do not support them.
    """
    writer, whole, place = writers[name], tmp_path / "whole" / "place", tmp_path / "folder" / "place"
    old = tmp_path / "old" / "place"
    writer(whole, 0)
    writer(old, 1)
    for n in range(1000):
        shutil.rmtree(place.parent, ignore_errors=True)
        shutil.copytree(old.parent, place.parent) if there else place.parent.mkdir()
        before, count, failed = contents(place.parent), [0], []

        def fail(call: str, args: tuple, count=count, failed=failed, n=n) -> None:
            if failed or (call in ("unlink", "rmdir") and (Path(args[0]).parent != place or ".part" in str(args[0]))):
                return  # a failure while removing leftovers is ignored
            count[0] += 1
            if count[0] == n + 1:
                failed.append(call)
                raise OSError(errno.ENOSPC, "No space left on device", *([] if call == "fsync" else [str(args[0])]))

        try:
            with calls(monkeypatch, fail):
                writer(place, 0)
        except OSError as error:
            assert error.errno == errno.ENOSPC and "make room there, or choose another disk" in error.strerror
            assert error.filename.startswith(str(place.parent)) and ".part" not in error.filename
            assert not list(place.parent.glob(".*.part")), (n, failed)
            if contents(place.parent) != before:
                assert readable(place) == readable(whole), (n, failed)
                # The last link to whole files is not removed where it is not known whether their names are on the disk.
                assert all(contents(part) == readable(whole) for part in place.glob(".*.part")), (n, failed)
        else:
            assert contents(place.parent) == contents(whole.parent), (n, failed)
            if not failed:
                break
            assert failed == ["link"]
    assert n > 2


@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_fills_up_is_an_error_of_the_system(writers, tmp_path, name):
    """With a limit on the size of a file, as the system itself says it, whatever the size: nothing is left."""
    writer, place = writers[name], tmp_path / "folder" / "place"
    writer(place, 0)
    largest = max(len(data) for data in contents(place.parent).values())
    shutil.rmtree(place.parent)
    for size in (largest - 1, largest // 2, largest // 7, 0):
        with limited(size), pytest.raises(OSError, match="File too large, while writing; choose another disk") as error:
            writer(place, 0)
        assert error.value.errno == errno.EFBIG and str(error.value.filename).startswith(str(place))
        assert not place.parent.exists()


@pytest.mark.parametrize("name", WRITERS)
def test_a_place_where_nothing_can_be_is_an_error_before_any_work(writers, tmp_path, monkeypatch, name):
    (tmp_path / "file").write_text("mine")
    writer = writers[name]
    (tmp_path / "folder" / "place").mkdir(parents=True)
    places = {tmp_path / "file" / "below": errno.EEXIST, tmp_path / ("x" * 300) / "below": errno.ENAMETOOLONG}
    if name in FILES:
        places[tmp_path / "folder" / "place"] = errno.EISDIR
    if name in FOLDERS:
        places[tmp_path / "file"] = errno.ENOTDIR
    if name == "curve":
        places = {place: number for place, number in places.items() if number == errno.EISDIR}
    before = contents(tmp_path)
    for place, number in places.items():
        with pytest.raises(OSError, match=", while writing; ") as error:
            writer(place, 0)
        assert error.value.errno in (number, errno.ENOTDIR)
    (tmp_path / "metrics.jsonl").unlink(missing_ok=True)
    assert contents(tmp_path) == before


def test_an_error_of_another_file_stays_as_it_is(tmp_path):
    with pytest.raises(FileNotFoundError) as error, replacing(tmp_path / "file"):
        (tmp_path / "source").read_text()
    assert error.value.filename == str(tmp_path / "source") and error.value.strerror == "No such file or directory"
    with pytest.raises(FileNotFoundError, match="^source: no such file$"), replacing(tmp_path / "file"):
        raise FileNotFoundError("source: no such file")
    assert not os.listdir(tmp_path)


def test_the_command_line_says_it_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "d").mkdir()
    (tmp_path / "text.txt").write_text("a story of a cat " * 100)
    learn = ["tokenizer", "text.txt", "--vocab-size", "280", "--force", "--out"]
    for args, message in [(["convert", "stories", "file/x", "--to", "hf"], "file: File exists, while writing"),
                          ([*learn, "x" * 300], "File name too long"), ([*learn, "d"], "d: Is a directory")]:
        monkeypatch.setattr("sys.argv", ["llama-fn", *args])
        with pytest.raises(SystemExit) as stop:
            main.main()
        line = capsys.readouterr().err.splitlines()[-1]
        assert stop.value.code == 2 and line.startswith("llama-fn: ") and message in line, line


@pytest.mark.slow
@pytest.mark.parametrize("args", [("generate", "Once", "--max-new-tokens", "3"), ("inspect",), ("--version",)],
                         ids=["text", "table", "version"])
def test_output_to_a_full_disk_is_one_line_too(args):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "llama_fn", *args]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (2, "llama-fn: standard output: No space left on device\n")
