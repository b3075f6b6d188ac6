import math
import os
import re

import pytest
import torch
from folders import bits, failing, full_disk, same
from hypothesis import given
from hypothesis import strategies as st

import llama_fn as lf
from llama_fn import tree
from llama_fn.checkpoint.snapshot import load_snapshot, save_snapshot

leaves = st.builds(lambda first, shape, dtype: (first + torch.arange(math.prod(shape))).reshape(shape).to(dtype),
                   st.integers(-2**40, 2**40), st.lists(st.integers(0, 4), max_size=3).map(tuple),
                   st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64,
                                    torch.uint8, torch.bool]))
states = st.recursive(leaves | st.none(), lambda t: st.tuples(t, t) | st.lists(t, max_size=3) | st.dictionaries(
    st.text("abc", min_size=1), t, max_size=3), max_leaves=6)


def state(seed: int = 0) -> dict:
    a, b = lf.random.split(lf.random.key(seed))
    return {"params": (lf.random.normal(a, (5, 3)), lf.random.normal(b, (4,), torch.bfloat16)), "step": torch.tensor(7)}


@given(states)
def test_a_snapshot_is_loaded_bit_for_bit(tmp_path_factory, value):
    file = tmp_path_factory.mktemp("run") / "snapshot"
    save_snapshot(value, file)
    assert same(load_snapshot(tree.map(torch.zeros_like, value), file), value)
    assert os.listdir(file.parent) == ["snapshot"]


@given(st.sampled_from(["params.0", "params.1"]), st.data())
def test_a_flipped_bit_in_a_snapshot_is_found(tmp_path_factory, name, data):
    file = tmp_path_factory.mktemp("run") / "snapshot"
    save_snapshot(state(), file)
    content, leaf = bytearray(file.read_bytes()), bits(tree.paths(state())[name])[2]
    place = content.index(leaf) + data.draw(st.integers(0, len(leaf) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{re.escape(str(file))}: 1 leaves .*\n  {name}: damaged, its checksum"):
        load_snapshot(state(), file)


def test_all_leaves_of_another_run_are_named(tmp_path):
    save_snapshot(state(), tmp_path / "snapshot")
    like = {"params": (torch.zeros(3, 5), torch.zeros(4)), "key": torch.tensor(0)}
    with pytest.raises(ValueError) as error:
        load_snapshot(like, tmp_path / "snapshot")
    assert sorted(line.strip() for line in str(error.value).split("\n")[1:]) == [
        "missing: key", "params.0: should be float32[3, 5], is float32[5, 3]",
        "params.1: should be float32[4], is bfloat16[4]", "unknown: step"]


@pytest.mark.parametrize("leaf", [torch.ones(1).expand(10**7, 10**7), torch.empty(4, device="meta"), 5,
                                  torch.sparse_coo_tensor([[0]], [1.0], (4,), check_invariants=True)])
def test_a_leaf_that_is_no_whole_tensor_is_named(tmp_path, leaf):
    """A leaf that claims a large size is refused without allocating it."""
    torch.save({"leaves": {"x": leaf}, "checksums": {"x": 0}}, tmp_path / "snapshot")
    for like in ({"x": torch.zeros(4)}, {}):
        with pytest.raises(ValueError, match=r"snapshot: (1 leaves do not fit this run:\n  (x: should be|unknown: x)"
                                             r"|.*sparse tensor)"):  # which torch 2.14 refuses itself
            load_snapshot(like, tmp_path / "snapshot")


def test_what_is_no_snapshot_is_an_error(tmp_path):
    torch.save({"tok_embeddings.weight": torch.ones(4, 3)}, tmp_path / "consolidated.00.pth")
    with pytest.raises(ValueError, match=r"consolidated\.00\.pth: not a snapshot"):
        load_snapshot(state(), tmp_path / "consolidated.00.pth")
    with pytest.raises(FileNotFoundError, match="missing"):
        load_snapshot(state(), tmp_path / "missing")
    save_snapshot(state(), tmp_path / "snapshot")
    os.truncate(tmp_path / "snapshot", 500)
    with pytest.raises(ValueError, match="snapshot: not a file of tensors, or a damaged one"):
        load_snapshot(state(), tmp_path / "snapshot")


def test_a_failed_snapshot_leaves_the_one_before(tmp_path, monkeypatch):
    save_snapshot(state(1), tmp_path / "snapshot")
    monkeypatch.setattr(torch, "save", failing(torch.save, full_disk()))
    with pytest.raises(OSError, match="No space left"):
        save_snapshot(state(2), tmp_path / "snapshot")
    assert os.listdir(tmp_path) == ["snapshot"]
    assert same(load_snapshot(state(), tmp_path / "snapshot"), state(1))
