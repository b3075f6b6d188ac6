"""Small files that claim to be large: each is refused quickly, in little memory, by an error that names it."""

import io
import json
import os
import pickle
import struct
import time
import tracemalloc
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from folders import same
from hypothesis import given
from hypothesis import strategies as st

import llama_fn as lf
from llama_fn.checkpoint.files import read_json, read_tensors
from llama_fn.checkpoint.limits import MOST_HEADER, MOST_OPCODES, MOST_PICKLE
from llama_fn.checkpoint.snapshot import load_snapshot, save_snapshot
from llama_fn.checkpoint.snapshot_pt import load_snapshot_pt

STATE = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
BYTES = 2**26


def refused(read: Callable[[], object], message: str, measure: bool = True) -> None:
    with pytest.raises(ValueError, match=message):
        read()
    if not measure:  # measuring takes ten times as long
        return
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=message):
            read()
        assert tracemalloc.get_traced_memory()[1] < BYTES
    finally:
        tracemalloc.stop()


def entries(state: object) -> dict[str, bytes]:
    """What `torch.save` writes into its archive."""
    file = io.BytesIO()
    torch.save(state, file)
    with zipfile.ZipFile(file) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def archive(file: Path, parts: dict[str, bytes], packed: tuple[str, ...] = ()) -> Path:
    with zipfile.ZipFile(file, "w") as out:
        for name, data in parts.items():
            out.writestr(name, data, zipfile.ZIP_DEFLATED if name in packed else zipfile.ZIP_STORED)
    return file


def pickled(file: Path, data: bytes) -> Path:
    return archive(file, entries(STATE) | {"archive/data.pkl": data})


# --- what is no bomb


@given(st.dictionaries(st.text(max_size=5), st.sampled_from([
    torch.zeros(2, 3), torch.ones(5, dtype=torch.bfloat16), torch.zeros(0), torch.tensor(7), torch.ones(3).bool(),
    torch.zeros(2, 2, dtype=torch.uint8), torch.nn.Parameter(torch.ones(2)), 5, 2**40, 0.5, "text", None, True, [1, 2],
    (1, "a"), {"b": torch.zeros(2)}, OrderedDict(c=1), torch.float16, torch.Size((2, 3)), torch.device("cpu"),
    torch.ones(2).to(torch.float8_e4m3fn), torch.zeros(3, dtype=torch.complex64)])))
def test_what_torch_saves_is_read(tmp_path_factory, state):
    file = tmp_path_factory.mktemp("some") / "file"
    torch.save(state, file)
    read = read_tensors(file)
    assert read.keys() == state.keys() and all(type(read[name]) is type(x) for name, x in state.items())


def test_an_archive_of_other_tools_without_64_bits_is_read(tmp_path):
    assert same(read_tensors(archive(tmp_path / "file", entries(STATE))), STATE)


def test_a_state_of_as_many_leaves_as_the_largest_models_have_is_read(tmp_path):
    leaves = {f"params.blocks.{i}.feed_forward.w_down": torch.zeros(1) for i in range(3500)}
    checksums = dict.fromkeys(leaves, zlib.crc32(bytes(4)))
    torch.save({"leaves": leaves, "checksums": checksums}, tmp_path / "snapshot.pt")
    assert same(load_snapshot_pt(leaves, tmp_path / "snapshot.pt"), leaves)
    save_snapshot(leaves, tmp_path / "snapshot")
    assert same(load_snapshot(leaves, tmp_path / "snapshot"), leaves)


# --- archives


def test_an_archive_with_a_compressed_entry_is_refused(tmp_path):
    """Any entry may unpack from three million bytes to three thousand million."""
    zeros = bytes(10**8)
    for name in ("archive/data.pkl", "archive/data/0", "archive/version", "archive/byteorder", "more"):
        archive(tmp_path / "bomb", entries(STATE) | {name: zeros}, packed=(name,))
        assert (tmp_path / "bomb").stat().st_size < 200_000
        refused(lambda: read_tensors(tmp_path / "bomb"), f"bomb: not a file of tensors.*{name} is compressed")


def test_entries_that_lie_in_the_same_place_are_refused(tmp_path):
    """A directory may name the same million bytes a thousand times."""
    file = archive(tmp_path / "bomb", entries(STATE) | {"archive/big": bytes(10**6)})
    data = file.read_bytes()
    end, directory = data[-22:], data[struct.unpack("<L", data[-6:-2])[0]:-22]
    record = directory[directory.rindex(b"PK\1\2"):]
    directory += b"".join(record.replace(b"/big", b"/%03d" % i) for i in range(1000))
    end = end[:8] + struct.pack("<2H2L", 1000, 1000, len(directory), len(data) - len(record) - 22) + b"\0\0"
    start = struct.unpack("<L", data[-6:-2])[0]
    end = end[:12] + struct.pack("<2L", len(directory), start) + b"\0\0"
    end = end[:8] + struct.pack("<2H", *[directory.count(b"PK\1\2")] * 2) + end[12:]
    file.write_bytes(data[:start] + directory + end)
    refused(lambda: read_tensors(file), r"its entries have 1,001,00\d,\d+ bytes, and the file")


@pytest.mark.parametrize("change", [
    lambda data: data + b"more", lambda data: data[:-2] + b"\4\0more", lambda data: b"more" + data,
    lambda data: data[:-6] + struct.pack("<L", struct.unpack("<L", data[-6:-2])[0] + 1) + data[-2:],
    lambda data: data[:-22] + b"PK\6\6" + bytes(52) + b"PK\6\7" + bytes(16) + data[-22:]])
def test_an_archive_whose_end_can_be_read_in_two_ways_is_refused(tmp_path, change):
    """Otherwise torch could find another directory than the one that was checked."""
    file = archive(tmp_path / "bomb", entries(STATE))
    file.write_bytes(change(file.read_bytes()))
    refused(lambda: read_tensors(file), "bomb: not a file of tensors, or a damaged one")


def test_what_is_no_archive_is_refused(tmp_path):
    """The formats before torch 1.6, too."""
    torch.save(STATE, tmp_path / "old", _use_new_zipfile_serialization=False)
    (tmp_path / "pickle").write_bytes(pickle.dumps({"a": 1}))
    (tmp_path / "empty").touch()
    (tmp_path / "zeros").write_bytes(bytes(10**6))
    for name in ("old", "pickle", "empty", "zeros"):
        refused(lambda name=name: read_tensors(tmp_path / name), f"{name}: not a file of tensors, or a damaged one")


# --- pickles


class Call:
    """An object whose pickle calls a function."""

    def __init__(self, function: Callable, *args: object) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple:
        return self.call


def made_storage(kind: str, make: bytes) -> bytes:
    """{"a": a storage of ten thousand million numbers}."""
    return b"\x80\x02}X\x01\0\0\0ac%b\n\x8a\x05%b\x85%bs." % (
        kind.replace(" ", "\n").encode(), (10**10).to_bytes(5, "little"), make)


def nested(depth: int) -> bytes:
    """{t: 1}, where t is a pair of the same pair, and so on to a depth: its hash takes 2^depth steps."""
    pairs = b"".join(b"h%c\x86q%c" % (i, i + 1) for i in range(depth))
    return b"\x80\x02})q\x00" + pairs + b"K\x01s."


@pytest.mark.parametrize("data, message", [
    (pickle.dumps({"a": Call(bytearray, 10**10)}, 2), "bytearray has no place"),
    (pickle.dumps({"a": Call(torch.Tensor, 10**9, 100)}, 2), "torch.Tensor has no place|torch._tensor.Tensor has no"),
    (pickle.dumps({"a": bytes(10)}, 2), "_codecs.encode has no place"),
    (pickle.dumps({"a": {1, 2}}, 2), "set has no place"),
    (pickle.dumps({5: 1}, 2), "a dictionary with a key that is not a string"),
    (pickle.dumps({"a": {(i << 61) - i: None for i in range(2, 3_000)}}, 2), "a key that is not a string"),
    (pickle.dumps({"a": OrderedDict([((1, 2), 3)])}, 2), "a key that is not a string"),
    (pickle.dumps({"a": Call(OrderedDict, [[(1, 2), 3]])}, 2), "a dictionary that is made of a sequence"),
    (b"\x80\x02}(" + b"()\x85t" * (MOST_OPCODES // 4 + 1) + b".", r"more than 262,144 opcodes"),
    (b"\x80\x02}X" + struct.pack("<I", MOST_PICKLE) + b"a" * MOST_PICKLE + b"K\x01s.",
     r"data\.pkl has 2,097,\d+ bytes"),
    (b"\x80\x02}X\xff\xff\xff\x7fa.", "damaged"), (b"\x80\x02h\x05.", "damaged"), (b"\x80\x02s.", "damaged"),
    (b"\x80\x02u.", "damaged"), (b"", "damaged"), (b"\x80\x02.", "damaged"), (b"\x80\x05}\x94.", "damaged"),
    (nested(60), "a key that is not a string"),
    *((made_storage(kind, make), f"{kind.replace(' ', '.')} is called") for make in (b"R", b"\x81")
      for kind in ("torch.storage UntypedStorage", "torch.storage TypedStorage", "torch FloatStorage")),
    (made_storage("collections OrderedDict", b"\x81"), "collections.OrderedDict is called"),
], ids=lambda x: None if isinstance(x, str) else "")
def test_a_pickle_that_grows_is_refused(tmp_path, data, message):
    refused(lambda: read_tensors(pickled(tmp_path / "bomb", data)), f"bomb: not a file of tensors.*({message})",
            measure="opcodes" not in message)


def test_a_deep_pickle_is_read_or_refused(tmp_path):
    deep = b"\x80\x02}X\x01\x00\x00\x00a" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"s."
    try:
        state = read_tensors(pickled(tmp_path / "deep", deep))
    except ValueError as error:
        assert "deep: not a file of tensors" in str(error)
    else:
        assert list(state) == ["a"]


def test_the_hash_of_a_nested_tuple_takes_forever(tmp_path):
    """torch itself loads it, so the danger is real. (Each further level doubles the time.)"""
    def seconds(depth: int) -> float:
        file, begun = pickled(tmp_path / "bomb", nested(depth)), time.perf_counter()
        torch.load(file, weights_only=True)
        return time.perf_counter() - begun

    assert seconds(25) > 4 * seconds(15)


@pytest.mark.parametrize("numbers", [10**4, 10**8, 10**12, 2**61, 2**63 - 1])
def test_a_storage_that_claims_more_than_its_entry_is_refused(tmp_path, numbers):
    parts = entries({"a": torch.arange(6.0)})
    data = parts["archive/data.pkl"]
    longer = b"\x8a\x08" + struct.pack("<q", numbers)
    assert data.count(b"K\x06") == 2  # the storage's numbers, and the tensor's
    for places in (1, 2):
        file = archive(tmp_path / "bomb", parts | {"archive/data.pkl": data.replace(b"K\x06", longer, places)})
        try:
            state = read_tensors(file)
        except ValueError as error:
            assert "bomb: not a file of tensors" in str(error)
            continue
        # Either the claim costs nothing, or the tensor itself says that it has no numbers.
        assert state["a"].untyped_storage().nbytes() < max(state["a"].nbytes, 10**6)


# --- other files


@pytest.fixture
def folder(model, tmp_path) -> Path:
    lf.save(model, tmp_path / "hf", format="hf")
    lf.save(model, tmp_path / "meta")
    lf.save(model, tmp_path / "llama2c", format="llama2c")
    return tmp_path


def test_settings_and_tokenizers_of_any_size_are_refused_unread(folder):
    """The files are sparse and take no space on the disk."""
    for format, name in [("hf", "config.json"), ("meta", "params.json"), ("hf", "tokenizer.model"),
                         ("meta", "tokenizer.model"), *(("hf", name) for name in (
                             "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
                             "generation_config.json"))]:
        before = (folder / format / name).read_bytes()
        os.truncate(folder / format / name, 10**12)
        refused(lambda format=format: lf.load(folder / format), rf"{name}: 1,000,000,000,000 bytes, at most")
        (folder / format / name).write_bytes(before)
    with pytest.raises(ValueError, match="list: 10 bytes, at most 9 are read"):
        (folder / "list").write_text('{"a": 100}')
        read_json(folder / "list", most=9)


def test_a_header_of_safetensors_as_long_as_it_may_be_is_refused(folder):
    file = folder / "hf" / "model.safetensors"
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"{i}": entry for i in range(80_000)}).encode()
    assert len(header) > MOST_HEADER
    file.write_bytes(struct.pack("<Q", len(header)) + header)
    refused(lambda: lf.load(folder / "hf"), r"model\.safetensors: not a safetensors.*: a header of 5,\d+,\d+ bytes,")


def test_a_file_of_llama2c_with_holes_is_refused(folder):
    """A sparse file of the size that its header implies, with ten million layers."""
    file = folder / "llama2c" / "model.bin"
    config = lf.Config(2, 10**7, 1, 1, 3, 1, max_seq_len=4)
    file.write_bytes(struct.pack("<7i", 2, 1, 10**7, 1, 1, -3, 4))
    os.truncate(file, 28 + 4 * (config.n_params + 4 * config.head_dim))
    refused(lambda: lf.load(folder / "llama2c"), r"model\.bin: .*10000000 layers, at most 4096 are read")
