"""After a power cut or a killed program, all old files are there or all new ones, never a mixture."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from folders import contents
from writers import FILES, WRITERS, Writer, all_writers, calls, readable, visible

import llama_fn as lf
from llama_fn import tree
from llama_fn.checkpoint.atomic import replacing, replacing_folder
from llama_fn.checkpoint.files import read_json, write_json


@pytest.fixture(scope="module")
def writers(texts, tmp_path_factory) -> dict[str, Writer]:
    return all_writers(texts, tmp_path_factory.mktemp("metrics"))


def state(path: Path) -> tuple:
    """The identity of a file, and the time of its last write."""
    about = os.stat(path)
    return about.st_ino, about.st_size, about.st_mtime_ns


# --- a power cut


@pytest.mark.parametrize("there", [False, True], ids=["new", "over another"])
@pytest.mark.parametrize("name", WRITERS)
def test_all_is_on_the_disk_before_it_gets_its_name_and_the_names_at_the_end(writers, tmp_path, monkeypatch, name,
                                                                             there):
    """A file that is renamed or linked was synced after it was last written, all files of a folder and the folder, too;
    every folder in which a name came is synced after; and old files are gone before the new ones come.
    """
    writer, place, synced, due, gone = writers[name], tmp_path / "a" / "b" / "place", set(), {}, set()
    if there:
        writer(place, 1)

    def watch(call: str, args: tuple) -> None:
        if call != "fsync" and not str(args[0]).startswith(str(tmp_path)):
            return  # a library's own folders
        if call == "fsync":
            path = Path(os.readlink(f"/proc/self/fd/{args[0]}"))
            synced.add(state(path))
            due.pop(path, None)
        if call in ("rename", "replace", "link"):
            source, target = Path(args[0]).absolute(), Path(args[1]).absolute()
            assert {state(path) for path in (source, *(source.iterdir() if source.is_dir() else ()))} <= synced, source
            due[target.parent] = target
            assert call != "link" or target.parent not in gone
        if call == "mkdir" and not str(args[0]).endswith(".part"):
            due[Path(args[0]).absolute().parent] = args[0]
        if call == "unlink" and Path(args[0]).parent == place:
            gone.add(place)
        if call == "fsync":
            gone.discard(path)

    with calls(monkeypatch, watch):
        writer(place, 0)
    assert not due and synced


# --- a program that is killed


class Killed(BaseException):
    """Raised in place of a system call; after it, every further call fails too."""


def killed_at(monkeypatch, step: int, write: Callable[[], None]) -> bool:
    """Whether the program was killed before it had finished."""
    count = [0]

    def end(call: str, args: tuple) -> None:
        count[0] += 1
        if count[0] > step:
            raise Killed

    try:
        with calls(monkeypatch, end):
            write()
    except Killed:
        return True
    return count[0] > step


def quickly(monkeypatch, write: Callable[[], None]) -> None:
    """Without waiting for the disk."""
    assert not killed_at(monkeypatch, 10**9, write)


@pytest.mark.parametrize("old, new", [("meta", "two of meta"), ("two of meta", "two of meta"),
                                      ("two of meta", "quantized"), ("hf", "three of hf"), ("three of hf", "hf"),
                                      ("three of hf", "three of hf"), ("llama2c", "llama2c"), ("adapter", "adapter")])
def test_a_killed_save_leaves_the_old_files_or_the_new_ones(writers, tmp_path, monkeypatch, old, new):
    """`load` sees one or the other at every step. A program that ignores `.complete` never sees a mixture."""
    before, after = tmp_path / "before", tmp_path / "after"
    writers[old](before, 1)
    writers[new](after, 2)
    models, seen = [contents(before), contents(after)], []
    for step in range(1000):
        folder = tmp_path / f"{step}"
        shutil.copytree(before, folder)
        if not killed_at(monkeypatch, step, lambda folder=folder: writers[new](folder, 2)):
            break
        assert readable(folder) in models, step
        seen.append(models.index(readable(folder)))
        assert any(visible(folder).items() <= model.items() for model in models), step
        if new != "adapter":
            loaded = lf.load(folder).params
            assert torch.equal(tree.leaves(loaded)[-1], tree.leaves(lf.load((before, after)[seen[-1]]).params)[-1])
        quickly(monkeypatch, lambda folder=folder: writers[new](folder, 2))
        assert contents(folder) == models[1], step  # and nothing hidden is left
        shutil.rmtree(folder)
    assert seen == sorted(seen) and set(seen) == {0, 1} and contents(folder) == models[1]


@pytest.mark.parametrize("name", WRITERS)
def test_a_killed_save_to_a_new_place_leaves_all_or_nothing(writers, tmp_path, monkeypatch, name):
    writer = writers[name]
    writer(tmp_path / "whole" / "place", 0)
    for step in range(1000):
        place = tmp_path / f"{step}" / "place"
        if not killed_at(monkeypatch, step, lambda place=place: writer(place, 0)):
            break
        assert not place.exists() or contents(place.parent) == contents(tmp_path / "whole"), step
        if not place.exists():
            quickly(monkeypatch, lambda place=place: writer(place, 0))
            assert contents(place.parent) == contents(tmp_path / "whole"), step
    assert step > 3


@pytest.mark.parametrize("name", FILES)
def test_a_killed_writer_of_one_file_leaves_the_old_or_the_new_one(writers, tmp_path, monkeypatch, name):
    writer, place = writers[name], tmp_path / "folder" / "place"
    writer(place, 0)
    new = place.read_bytes()
    for step in range(1000):
        place.unlink()
        writer(place, 1)
        old = place.read_bytes()
        if not killed_at(monkeypatch, step, lambda: writer(place, 0)):
            break
        assert place.read_bytes() in (old, new) and old != new
        writer(place, 0)
        assert os.listdir(place.parent) == ["place"]


# --- other systems, other writers


@pytest.mark.parametrize("name", ["meta", "hf", "llama2c", "adapter"])
def test_a_file_system_without_links_takes_copies(writers, tmp_path, monkeypatch, name):
    writer = writers[name]
    writer(tmp_path / "whole", 0)
    writer(tmp_path / "place", 1)

    def none(*args: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", none)
    writer(tmp_path / "place", 0)
    assert contents(tmp_path / "place") == contents(tmp_path / "whole")


def test_the_longest_name_can_be_written(tmp_path):
    name = "ä" * 127 + "x"  # 255 bytes
    write_json(tmp_path / name, {"a": 1})
    assert read_json(tmp_path / name) == {"a": 1}


def test_two_writers_of_one_place_do_not_mix(tmp_path):
    """The later writer removes the files of the earlier one, which may be dead. If it is alive, it gets an error."""
    with pytest.raises(FileNotFoundError), replacing_folder(tmp_path / "place") as first:
        (first / "a").write_text("first")
        with replacing_folder(tmp_path / "place") as second:
            assert first != second
            (second / "b").write_text("second")
    assert contents(tmp_path / "place") == {"b": b"second"} and len(os.listdir(tmp_path)) == 1


@pytest.mark.parametrize("other", ["place.v2", "place.deadbeef", "place."])
def test_writers_of_two_places_leave_each_other_alone(tmp_path, other):
    """Even if one name begins with the other name, both files or folders are complete."""
    for outer, inner in ((tmp_path / "1" / "place", tmp_path / "1" / other),
                         (tmp_path / "2" / other, tmp_path / "2" / "place")):
        with replacing_folder(outer) as first:
            (first / "a").write_text("first")
            with replacing_folder(inner) as second:
                (second / "a").write_text("second")
        with replacing(outer.parent / "files" / outer.name) as first:
            first.write_text("first")
            write_json(outer.parent / "files" / inner.name, {})
        assert (outer / "a").read_text() == "first" == (outer.parent / "files" / outer.name).read_text()
    assert not list(tmp_path.glob("**/.*"))
