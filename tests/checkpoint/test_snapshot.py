"""A snapshot is loaded bit for bit or not at all, and says which leaf or file is wrong."""

import json
import math
import os
import re
import zlib
from pathlib import Path

import pytest
import torch
from folders import bits, same
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import llama_fn as lf
from llama_fn import tree
from llama_fn.checkpoint.sealed import sealed, unsealed
from llama_fn.checkpoint.snapshot import load_snapshot, read_about, save_snapshot
from llama_fn.checkpoint.snapshot_pt import load_snapshot_pt

leaves = st.builds(lambda first, shape, dtype: (first + torch.arange(math.prod(shape))).reshape(shape).to(dtype),
                   st.integers(-2**40, 2**40), st.lists(st.integers(0, 4), max_size=3).map(tuple),
                   st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64,
                                    torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]))
states = st.recursive(leaves | st.none(), lambda t: st.tuples(t, t) | st.lists(t, max_size=3) | st.dictionaries(
    st.text("abc", min_size=1), t, max_size=3), max_leaves=6)


def state(seed: int = 0) -> dict:
    a, b = lf.random.split(lf.random.key(seed))
    return {"params": (lf.random.normal(a, (5, 3)), lf.random.normal(b, (4,), torch.bfloat16)), "step": torch.tensor(7)}


def write_old(value, file: Path) -> None:
    """As earlier versions wrote a snapshot."""
    named = {name: x.contiguous() for name, x in tree.paths(value).items()}
    torch.save({"leaves": named, "checksums": {name: zlib.crc32(bits(x)[2]) for name, x in named.items()}}, file)


@given(states)
def test_a_snapshot_is_loaded_bit_for_bit(tmp_path_factory, value):
    folder = tmp_path_factory.mktemp("run") / "snapshot"
    save_snapshot(value, folder, {"step": 3})
    assert same(load_snapshot(tree.map(torch.zeros_like, value), folder), value)
    assert read_about(folder) == {"step": 3}
    assert os.listdir(folder.parent) == ["snapshot"]
    assert sorted(os.listdir(folder)) == ["manifest.json", "state.safetensors"]
    read = load_file(folder / "state.safetensors")  # by safetensors' own reader
    assert {name: bits(x) for name, x in read.items()} == {name: bits(x) for name, x in tree.paths(value).items()}


def test_every_leaf_begins_at_a_multiple_of_its_numbers_bytes(tmp_path):
    """As safetensors' own writer has it: other readers map numbers where they lie."""
    save_snapshot({"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(2, dtype=torch.float64),
                   "c": torch.ones(1, dtype=torch.bfloat16), "d": torch.ones(3)}, tmp_path / "snapshot")
    content = (tmp_path / "snapshot" / "state.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8:8 + length])
    assert length % 8 == 0
    assert all(header[name]["data_offsets"][0] % size == 0 for name, size in zip("abcd", (1, 8, 2, 4), strict=True))


@given(st.sampled_from(["params.0", "params.1"]), st.data())
def test_a_flipped_bit_in_a_leaf_is_found_and_the_leaf_is_named(tmp_path_factory, name, data):
    folder = tmp_path_factory.mktemp("run") / "snapshot"
    save_snapshot(state(), folder)
    file, leaf = folder / "state.safetensors", bits(tree.paths(state())[name])[2]
    content = bytearray(file.read_bytes())
    place = content.index(leaf) + data.draw(st.integers(0, len(leaf) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{re.escape(str(folder))}: 1 leaves .*\n  {name}: damaged, its digest"):
        load_snapshot(state(), folder)


@given(st.sampled_from(["manifest.json", "state.safetensors"]), st.data())
def test_a_flipped_bit_anywhere_is_found_or_harmless(tmp_path_factory, name, data):
    folder = tmp_path_factory.mktemp("run") / "snapshot"
    save_snapshot(state(), folder, {"step": 7, "valid_loss": 1.25})
    content = bytearray((folder / name).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    (folder / name).write_bytes(content)
    try:
        found = load_snapshot(state(), folder), read_about(folder)
    except ValueError as error:
        assert str(folder) in str(error)
    else:
        assert same(found[0], state()) and found[1] == {"step": 7, "valid_loss": 1.25}


def test_a_flipped_bit_in_what_the_writer_says_is_found_wherever_it_is(tmp_path):
    save_snapshot(state(), tmp_path / "snapshot", {"step": 7, "valid_loss": 1.25})
    file = tmp_path / "snapshot" / "manifest.json"
    content = file.read_bytes()
    begin = content.index(b'"about"')
    for bit in range(8 * begin, 8 * (content.index(b"}", begin) + 1)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        file.write_bytes(changed)
        try:
            assert read_about(tmp_path / "snapshot") == {"step": 7, "valid_loss": 1.25}  # a space became a line's end
        except ValueError as error:
            assert str(file) in str(error)


@pytest.mark.parametrize("name", ["manifest.json", "state.safetensors"])
def test_a_snapshot_cut_short_anywhere_is_an_error_with_its_name(tmp_path, name):
    save_snapshot(state(), tmp_path / "snapshot")
    content = (tmp_path / "snapshot" / name).read_bytes()
    for part in range(64):
        (tmp_path / "snapshot" / name).write_bytes(content[:len(content) * part // 64])
        with pytest.raises(ValueError, match=name):
            load_snapshot(state(), tmp_path / "snapshot")
    (tmp_path / "snapshot" / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name}: no such file"):
        load_snapshot(state(), tmp_path / "snapshot")


def test_all_leaves_of_another_run_are_named(tmp_path):
    like = {"params": (torch.zeros(3, 5), torch.zeros(4)), "key": torch.tensor(0)}
    save_snapshot(state(), tmp_path / "snapshot")
    write_old(state(), tmp_path / "snapshot.pt")
    for load in (lambda: load_snapshot(like, tmp_path / "snapshot"),
                 lambda: load_snapshot_pt(like, tmp_path / "snapshot.pt")):
        with pytest.raises(ValueError) as error:
            load()
        assert sorted(line.strip() for line in str(error.value).split("\n")[1:]) == [
            "missing: key", "params.0: should be float32[3, 5], is float32[5, 3]",
            "params.1: should be float32[4], is bfloat16[4]", "unknown: step"]


def test_the_manifest_of_another_snapshot_is_an_error(tmp_path):
    for seed in (0, 1):
        save_snapshot(state(seed), tmp_path / f"{seed}")
    (tmp_path / "1" / "manifest.json").replace(tmp_path / "0" / "manifest.json")
    with pytest.raises(ValueError, match=r"2 leaves .*\n  params\.0: damaged.*\n  params\.1: damaged"):
        load_snapshot(state(), tmp_path / "0")
    save_snapshot({"x": torch.zeros(3)}, tmp_path / "0")
    (tmp_path / "0" / "manifest.json").write_text(json.dumps(sealed({"leaves": {}})))
    with pytest.raises(ValueError, match=r"manifest\.json: not the manifest of a snapshot"):
        load_snapshot({"x": torch.zeros(3)}, tmp_path / "0")


def test_a_leaf_that_a_snapshot_cannot_hold_is_named_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"x\.0: a snapshot cannot hold torch\.complex64"):
        save_snapshot({"x": [torch.zeros(3, dtype=torch.complex64)]}, tmp_path / "snapshot")
    assert not list(tmp_path.iterdir())


def test_a_save_can_be_given_up_and_leaves_the_snapshot_before(tmp_path):
    """There are four writes: three leaves and the manifest."""
    save_snapshot(state(1), tmp_path / "snapshot")
    for writes in range(5):
        left = [None] * writes
        if writes < 4:
            with pytest.raises(IndexError):
                save_snapshot(state(2), tmp_path / "snapshot", before_write=left.pop)
        else:
            save_snapshot(state(2), tmp_path / "snapshot", before_write=left.pop)
        assert os.listdir(tmp_path) == ["snapshot"]
        assert same(load_snapshot(state(), tmp_path / "snapshot"), state(1 if writes < 4 else 2))


@given(st.dictionaries(st.text(max_size=3), st.none() | st.integers() | st.floats(allow_nan=False)
                       | st.text(max_size=3), max_size=4), st.text(max_size=3))
def test_a_sealed_object_comes_back_and_a_changed_one_does_not(value, name):
    file = Path("some.json")
    read = json.loads(json.dumps(sealed(value)))
    assert unsealed(read, file) == value
    with pytest.raises(ValueError, match=r"some\.json: damaged, or edited"):
        unsealed({**read, name: "another"}, file)


# --- snapshots of earlier versions


@given(states)
def test_a_snapshot_of_an_earlier_version_is_loaded_bit_for_bit(tmp_path_factory, value):
    file = tmp_path_factory.mktemp("run") / "snapshot.pt"
    write_old(value, file)
    assert same(load_snapshot_pt(tree.map(torch.zeros_like, value), file), value)


def test_a_flipped_bit_in_a_snapshot_of_an_earlier_version_is_found(tmp_path):
    write_old(state(), tmp_path / "snapshot.pt")
    content = (tmp_path / "snapshot.pt").read_bytes()
    place = content.index(bits(state()["params"][0])[2])
    (tmp_path / "snapshot.pt").write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1:])
    with pytest.raises(ValueError, match=r"snapshot\.pt: 1 leaves .*\n  params\.0: damaged, its checksum"):
        load_snapshot_pt(state(), tmp_path / "snapshot.pt")


@pytest.mark.parametrize("leaf", [torch.ones(1).expand(10**7, 10**7), torch.empty(4, device="meta"), 5,
                                  torch.sparse_coo_tensor([[0]], [1.0], (4,), check_invariants=True)])
def test_a_leaf_that_is_no_whole_tensor_is_named(tmp_path, leaf):
    """A leaf that claims a large size is refused without allocating it."""
    torch.save({"leaves": {"x": leaf}, "checksums": {"x": 0}}, tmp_path / "snapshot")
    for like in ({"x": torch.zeros(4)}, {}):
        with pytest.raises(ValueError, match=r"snapshot: (1 leaves do not fit this run:\n  (x: should be|unknown: x)"
                                             r"|.*sparse tensor)"):  # which torch 2.14 refuses itself
            load_snapshot_pt(like, tmp_path / "snapshot")


def test_what_is_no_snapshot_of_an_earlier_version_is_an_error(tmp_path):
    torch.save({"tok_embeddings.weight": torch.ones(4, 3)}, tmp_path / "consolidated.00.pth")
    with pytest.raises(ValueError, match=r"consolidated\.00\.pth: not a snapshot"):
        load_snapshot_pt(state(), tmp_path / "consolidated.00.pth")
    with pytest.raises(FileNotFoundError, match="missing"):
        load_snapshot_pt(state(), tmp_path / "missing")
    write_old(state(), tmp_path / "snapshot.pt")
    os.truncate(tmp_path / "snapshot.pt", 500)
    with pytest.raises(ValueError, match="snapshot.pt: not a file of tensors, or a damaged one"):
        load_snapshot_pt(state(), tmp_path / "snapshot.pt")
