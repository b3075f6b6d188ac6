"""Meta's format in several files: what each file holds, and that only a complete set is loaded."""

import dataclasses
import math
import re
from pathlib import Path

import pytest
import torch
from folders import bits, contents, edit_weights, read_meta, same, write_meta
from hypothesis import given
from hypothesis import strategies as st
from strategies import keys, random_params

import llama_fn as lf
from llama_fn import tree
from llama_fn.checkpoint.load import write
from llama_fn.checkpoint.weights import weights_of

# The axis that is split, as in fairscale's ColumnParallelLinear, RowParallelLinear and ParallelEmbedding.
AXES = {"tok_embeddings": 1, "output": 0, "wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w2": 1, "w3": 0}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
COUNTS = st.integers(1, 4)


@st.composite
def divisible(draw, *counts: int) -> lf.Config:
    """Small configs that can be split into any of these numbers of shards, whose axes all differ in size."""
    common = math.lcm(*counts)
    k = draw(st.sampled_from([n for n in range(2, max(5, common + 1)) if n % common == 0]))
    g = draw(st.sampled_from([n for n in (2, 3, 4) if n != k]))
    layers = draw(st.sampled_from([n for n in (1, 2, 3) if n not in (k, g)]))
    h = draw(st.sampled_from([n for n in (6, 8, 10) if n not in (k, g, k * g)]))
    taken = {k, g, layers, h, k * g, k * h, g * h, k * g * h}
    widths = st.integers(11, 40).map(lambda n: n * common).filter(lambda n: n not in taken)
    f, v = draw(st.lists(widths, min_size=2, max_size=2, unique=True))
    return lf.Config(dim=k * g * h, n_layers=layers, n_heads=k * g, n_kv_heads=k, vocab_size=v, hidden_dim=f)


@st.composite
def split_models(draw, dtype: torch.dtype = torch.float32) -> tuple[lf.Params, int, int]:
    """Random parameters, and two numbers of shards for them."""
    counts = draw(COUNTS), draw(COUNTS)
    return random_params(draw(divisible(*counts)), draw(keys()), dtype), *counts


def shard(folder: Path, i: int) -> Path:
    return folder / f"consolidated.{i:02d}.pth"


def states(folder: Path) -> list[dict[str, torch.Tensor]]:
    return [torch.load(file) for file in sorted(folder.glob("*.pth"))]


@pytest.fixture(scope="module")
def whole(texts) -> lf.Model:
    """A model that can be split in 2 and in 4."""
    tokenizer = lf.train_tokenizer(texts, 400)
    config = lf.Config(dim=48, n_layers=3, n_heads=8, n_kv_heads=4, vocab_size=400, hidden_dim=76)
    return lf.Model(random_params(config, lf.random.key(1), torch.float32), tokenizer)


@pytest.fixture
def folder(whole, tmp_path) -> Path:
    lf.save(whole, tmp_path / "model", shards=4)
    return tmp_path / "model"


# --- whole sets


@given(split_models(), st.sampled_from(DTYPES))
def test_shards_of_any_number_hold_the_same_model(tmp_path_factory, drawn, dtype):
    (params, n, m), (first, second, direct) = drawn, [tmp_path_factory.mktemp("meta") for _ in range(3)]
    params = tree.map(lambda x: x.to(dtype), params)
    write_meta(params, first, n)
    again = read_meta(first)
    assert same(again, params)
    write_meta(again, second, m)
    write_meta(params, direct, m)
    assert contents(second) == contents(direct) and len(contents(second)) == m + 1
    assert same(read_meta(second), params)


@given(split_models())
def test_a_shard_holds_its_slice_of_every_matrix_and_every_norm(tmp_path_factory, drawn):
    (params, n, _), one, many = drawn, tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("many")
    write_meta(params, one)
    write_meta(params, many, n)
    whole = states(one)[0]
    for i, state in enumerate(states(many)):
        assert state.keys() == whole.keys()
        for name, x in whole.items():
            if (kind := name.split(".")[-2]) in AXES:
                width = x.shape[AXES[kind]] // n
                x = torch.movedim(torch.movedim(x, AXES[kind], 0)[i * width:(i + 1) * width], 0, AXES[kind])
            else:
                assert kind.endswith("norm")
            assert bits(state[name]) == bits(x)
            assert state[name].untyped_storage().nbytes() == x.nbytes  # and nothing of the others


@given(split_models(), st.sampled_from(DTYPES))
def test_casting_while_loading_is_casting_after(tmp_path_factory, drawn, dtype):
    (params, n, _), folder = drawn, tmp_path_factory.mktemp("meta")
    write_meta(params, folder, n)
    cast = tree.map(lambda x: x.to(dtype), params)
    assert same(read_meta(folder, dtype), cast)
    write_meta(cast, folder, n)
    assert same(read_meta(folder, torch.float64), tree.map(torch.Tensor.double, cast))


@given(split_models(), keys())
def test_the_frequencies_of_rope_are_left_out(tmp_path_factory, drawn, key):
    """Meta's first files hold RoPE's frequencies, which the config determines."""
    (params, n, _), folder = drawn, tmp_path_factory.mktemp("meta")
    write_meta(params, folder, n)
    for i, state in enumerate(states(folder)):
        freqs = lf.random.uniform(lf.random.fold_in(key, i), (params.config.head_dim // 2,))
        torch.save({"rope.freqs": freqs.bfloat16()} | state, shard(folder, i))
    assert same(read_meta(folder), params)


@pytest.mark.parametrize("shards", [None, 1, 2, 4])
def test_a_model_is_saved_in_as_many_shards_as_wanted(whole, folder, shards):
    (folder / "notes.txt").write_text("mine")
    lf.save(whole, folder, shards=shards, dtype=torch.bfloat16)
    assert sorted(file.name for file in folder.iterdir()) == [
        *(shard(folder, i).name for i in range(shards or 1)), "notes.txt", "params.json", "tokenizer.model"]
    assert same(lf.load(folder), tree.map(torch.Tensor.bfloat16, whole))


@pytest.mark.parametrize("shards", [1, 4])
def test_every_byte_of_the_weights_is_reported_as_it_is_written(whole, folder, shards):
    reports = []
    write(weights_of(whole.params), whole.tokenizer, folder, "meta", shards, reports.append)
    assert sum(reports) == sum(file.stat().st_size for file in folder.glob("*.pth")) and len(reports) > shards


@given(keys())
def test_one_file_is_mapped_and_nothing_written_to_it(tmp_path_factory, key):
    """Mapped weights have the same distances in memory as in the file; copies would not."""
    folder = tmp_path_factory.mktemp("meta")
    config = lf.Config(dim=48, n_layers=3, n_heads=6, n_kv_heads=2, vocab_size=50, hidden_dim=70)
    params = random_params(config, key, torch.float32)
    write_meta(params, folder)
    content = shard(folder, 0).read_bytes()
    again = read_meta(folder)
    assert len({x.data_ptr() - content.index(bits(x)[2]) for x in tree.leaves(again)}) == 1
    for x in tree.leaves(again):
        x.zero_()
    assert shard(folder, 0).read_bytes() == content and same(read_meta(folder), params)


# --- sets that are not whole


@pytest.mark.parametrize("gone", [0, 1, 2])
def test_a_shard_missing_before_the_last_is_named(folder, gone):
    shard(folder, gone).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(f"{shard(folder, gone)}: no such file")):
        lf.load(folder)


@pytest.mark.parametrize("there", [1, 2, 3])
def test_shards_missing_at_the_end_are_counted(folder, there):
    for i in range(there, 4):
        shard(folder, i).unlink()
    with pytest.raises(ValueError, match=rf"model: (.*\n)* *there are {there} of 4 shards, by the width of "
                                         r"tok_embeddings\.weight \(12 of 48\); consolidated\.00\.pth to "
                                         r"consolidated\.03\.pth belong together"):
        lf.load(folder)


def test_a_shard_too_many_is_counted(folder):
    shard(folder, 4).write_bytes(shard(folder, 3).read_bytes())
    with pytest.raises(ValueError, match="there are 5 of 4 shards"):
        lf.load(folder)


@given(divisible(2), st.sampled_from(["n_kv_heads", "hidden_dim", "vocab_size"]), st.sampled_from([0, -1, 2]))
def test_sizes_that_cannot_be_split_are_an_error(tmp_path_factory, config, size, shards):
    folder = tmp_path_factory.mktemp("meta")
    odd = {"n_kv_heads": 1} if size == "n_kv_heads" else {size: getattr(config, size) + 1}
    config = dataclasses.replace(config, **odd)
    message = f"{size} is {odd[size]}" if shards > 0 else f"their number must be at least 1, got {shards}"
    params = lf.init_params(lf.random.key(0), config)
    with pytest.raises(ValueError, match=f"^{shards} shards cannot be made: {message}$"):
        write_meta(params, folder, shards)
    assert not contents(folder)
    write_meta(params, folder)
    shard(folder, 1).write_bytes(shard(folder, 0).read_bytes())
    for i in range(2):  # as wide as those of two shards
        edit_weights(shard(folder, i), tok_embeddings=lambda x: x[:, ::2].clone())
    with pytest.raises(ValueError, match=rf"2 shards cannot make a model where {size} is {odd[size]}$"):
        read_meta(folder)


def test_norms_that_differ_between_shards_are_named(folder):
    edit_weights(shard(folder, 1), norm=lambda x: x + 1)
    edit_weights(shard(folder, 3), norm=lambda x: -x, attention_norm=lambda x: x.flip(0))
    with pytest.raises(ValueError) as error:
        lf.load(folder)
    assert sorted(line.strip() for line in str(error.value).split("\n")[1:]) == [
        "layers.0.attention_norm.weight: differs between consolidated.00.pth and consolidated.03.pth",
        "norm.weight: differs between consolidated.00.pth and consolidated.01.pth",
        "norm.weight: differs between consolidated.00.pth and consolidated.03.pth"]


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_a_norm_that_is_no_number_is_the_same_in_every_shard(whole, folder, shards, dtype):
    """Norms with NaN at the same places count as equal."""
    broken = lf.Model(whole.params._replace(norm=whole.params.norm * math.nan), whole.tokenizer)
    lf.save(broken, folder, shards=shards)
    assert lf.load(folder, dtype=dtype).params.norm.isnan().all()
    if shards > 1:
        edit_weights(shard(folder, 1), norm=lambda x: x.nan_to_num(1.0))
        with pytest.raises(ValueError, match="norm.weight: differs between"):
            lf.load(folder, dtype=dtype)


def test_all_that_does_not_fit_in_any_shard_is_named_in_one_error(folder):
    edit_weights(shard(folder, 1), wq=None, w2=lambda x: x.T, wk=torch.Tensor.bfloat16)
    edit_weights(shard(folder, 2), wq=torch.Tensor.bfloat16)
    torch.save(torch.load(shard(folder, 3)) | {"more": torch.ones(1)}, shard(folder, 3))
    wrong = ["layers.0.feed_forward.w2.weight in consolidated.01.pth: should be [48, 19], is float32[19, 48]",
             "missing: layers.0.attention.wq.weight in consolidated.01.pth", "unknown: more in consolidated.03.pth"]
    mixed = ["layers.0.attention.wk.weight in consolidated.01.pth: is bfloat16[6, 48] among float32; load it with a "
             "dtype", "layers.0.attention.wq.weight in consolidated.02.pth: is bfloat16[12, 48] among float32; load it "
             "with a dtype"]
    for dtype, lines in [(None, wrong + mixed), (torch.float32, wrong)]:
        with pytest.raises(ValueError) as error:
            lf.load(folder, dtype=dtype)
        first, *rest = str(error.value).split("\n")
        assert first == f"{folder}: {len(lines)} weights do not fit the settings:"
        assert sorted(line.strip() for line in rest) == sorted(lines)


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_mixed_dtypes_need_a_dtype(whole, folder, shards):
    """In one file, or one shard against the others."""
    rounded = lf.Model(tree.map(lambda x: x.bfloat16().float(), whole.params), whole.tokenizer)
    lf.save(rounded, folder, shards=shards)
    last = shard(folder, shards - 1)
    torch.save({name: x.bfloat16() if shards > 1 or name == "norm.weight" else x
                for name, x in torch.load(last).items()}, last)
    with pytest.raises(ValueError, match=rf"norm\.weight in {re.escape(last.name)}: is bfloat16\[48\] among float32; "
                                         "load it with a dtype"):
        lf.load(folder)
    assert same(lf.load(folder, dtype=torch.float32), rounded)


def test_a_damaged_shard_is_named(folder):
    shard(folder, 2).write_bytes(shard(folder, 2).read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{re.escape(str(shard(folder, 2)))}: not a file of tensors, or a damaged"):
        lf.load(folder)


def test_a_shard_that_is_a_copy_of_another_is_told(whole, tmp_path):
    write_meta(whole.params, tmp_path, 2)
    shard(tmp_path, 1).write_bytes(shard(tmp_path, 0).read_bytes())
    with pytest.warns(UserWarning, match=r"consolidated\.01\.pth holds the numbers of consolidated\.00\.pth: is it a "):
        read_meta(tmp_path)
    for i in range(2):
        edit_weights(shard(tmp_path, i), wq=lambda x: x * math.nan)
    with pytest.warns(UserWarning, match="is it a copy"):
        read_meta(tmp_path)
