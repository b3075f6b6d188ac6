"""Batches: functions of corpus, key and step, in which every token of every document comes as often as any other."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import keys, unicode_texts

import llama_fn as lf
from llama_fn import random
from llama_fn.training.data import Batch, Corpus, batch, encode_corpus, open_corpus, rows
from llama_fn.training.encode import Encoded
from llama_fn.training.shard import open_shard, write_shard
from llama_fn.training.step import make_step

BOS = 1
LARGE = 60_000  # tokens of a vocabulary in which every token of a corpus is another one
documents = st.lists(st.integers(1, 40), min_size=1, max_size=8)  # lengths, without the begin
contexts = st.integers(1, 16)


@pytest.fixture(scope="session")
def large(tokenizer) -> lf.Tokenizer:
    return lf.Tokenizer(tokenizer.model, added=((LARGE, "<last>"),))


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def corpus(folder, large):
    """A function that makes documents of these lengths. Every token but the begin tokens is another one, from 2 on."""
    def made(lengths: list[int], context: int, pack: bool = True, learned: bool = True) -> Corpus:
        stream = np.arange(2, 2 + sum(lengths) + len(lengths))
        edges = np.cumsum([n + 1 for n in lengths])
        stream[[0, *edges[:-1]]] = BOS
        write_shard(folder / "corpus", large, [Encoded(part, None if learned else part % 3 > 0)
                                               for part in np.split(stream, edges[:-1])])
        return open_corpus(folder / "corpus", large, context, pack)
    return made


def segments(made: Batch) -> list[list[tuple[list[int], list[bool]]]]:
    """The tokens of each segment of each row, and its mask; padding left out."""
    tokens, mask = made.tokens.reshape(-1, made.tokens.shape[-1]), made.mask.reshape(-1, made.mask.shape[-1])
    names = torch.zeros_like(tokens) if made.segments is None else made.segments.reshape(tokens.shape)
    found = []
    for row, counts, own in zip(tokens, mask, names, strict=True):
        assert not counts[own < 0].any()
        found.append([(row[own == name].tolist(), counts[own == name].tolist())
                      for name in range(int(own.max()) + 1)])
    return found


def predicted(made: Batch) -> list[int]:
    return made.tokens[made.mask].tolist()


def without_begins(stream: Corpus) -> list[int]:
    return [token for token in stream.tokens.tolist() if token != BOS]


# --- corpus

@given(st.lists(unicode_texts(), min_size=1))
def test_a_corpus_is_the_texts_tokens_with_begin_and_end(folder, tokenizer, texts):
    count = encode_corpus(iter(texts), tokenizer, folder / "encoded")
    tokens = [token for text in texts for token in tokenizer.encode(text, bos=True, eos=True)]
    stream = open_corpus(folder / "encoded", tokenizer, 5)
    assert stream.tokens.tolist() == tokens and count == len(tokens)
    assert stream.predictions.tolist() == [len(tokenizer.encode(text)) for text in texts]


@pytest.mark.parametrize("before", [None, b"an older corpus"])
def test_a_corpus_is_whole_or_as_it_was_before(tmp_path, tokenizer, before):
    def texts():
        yield "a text"
        raise ValueError("line 2: not JSON")

    if before:
        (tmp_path / "corpus").write_bytes(before)
    with pytest.raises(ValueError, match="line 2"):
        encode_corpus(texts(), tokenizer, tmp_path / "corpus")
    assert [file.read_bytes() for file in tmp_path.iterdir()] == ([before] if before else [])


@pytest.mark.parametrize("tokens", [[], [[BOS]], [[BOS], [BOS]]])
def test_a_file_without_a_token_to_predict_is_an_error(tmp_path, tokenizer, tokens):
    write_shard(tmp_path / "a.bin", tokenizer, [Encoded(np.array(x), None) for x in tokens])
    with pytest.raises(ValueError, match=r"a\.bin: there is no token to predict in it"):
        open_corpus(tmp_path / "a.bin", tokenizer, 8)
    with pytest.raises(ValueError, match="open_corpus: context must be at least 1, got 0"):
        open_corpus(tmp_path / "a.bin", tokenizer, 0)


@given(documents, contexts, st.integers(1, 9), st.booleans(), st.booleans())
def test_the_rows_predict_every_learned_token_of_every_document_once(corpus, lengths, context, size, pack, learned):
    stream, found = corpus(lengths, context, pack, learned), []
    for made in rows(stream, size):
        assert made.tokens.shape == made.mask.shape == (size, context + 1)
        assert (made.segments is not None) is pack
        found += predicted(made)
    assert sorted(found) == [token for token in without_begins(stream) if learned or token % 3 > 0]


@given(documents, contexts, st.booleans())
def test_one_document_a_row_is_a_stretch_of_it_and_padding(corpus, lengths, context, learned):
    stream = corpus(lengths, context, False, learned)
    (made,) = rows(stream, len(stream.rows.first) - 1)
    starts = [start for begin, n in zip(stream.begins, lengths, strict=True)
              for start in range(begin, begin + n, context)]
    for row, start in zip(made.tokens.tolist(), starts, strict=True):
        document = np.searchsorted(stream.begins, start, "right") - 1
        end = min(start + context, stream.begins[document] + lengths[document]) + 1
        own = stream.tokens[start + 1:end].tolist()
        assert row == [BOS, *own, *[0] * (context - len(own))]


# --- batches

@given(documents, contexts, keys(), st.integers(0, 100))
def test_a_batch_is_a_function_of_key_and_step_alone(corpus, lengths, context, key, step):
    stream = corpus(lengths, context)
    made = batch(stream, key, step, (2, 3))
    batch(stream, key, step + 1, (3, 2))
    again = batch(corpus(lengths, context), key.clone(), step, (2, 3))
    assert made.tokens.shape == (2, 3, context + 1)
    assert all(map(torch.equal, made, again))


def test_another_key_or_step_gives_another_batch(corpus):
    stream = corpus([40] * 50, 8)
    drawn = [batch(stream, random.key(seed), step, (2, 8)).tokens for seed in range(4) for step in range(4)]
    assert len({tuple(tokens.flatten().tolist()) for tokens in drawn}) == 16


@given(documents, contexts, keys(), st.integers(0, 3), st.booleans())
def test_an_epoch_predicts_every_token_and_its_rows_once(corpus, lengths, context, key, epoch, learned):
    """Where the mask is of a corpus that is all learned, beginnings of documents fill the rows."""
    stream = corpus(lengths, context, True, learned)
    count = len(stream.rows.first) - 1
    found = [token for step in range(epoch * count, (epoch + 1) * count)
             for token in predicted(batch(stream, key, step, (1, 1)))]
    if not learned:
        assert sorted(found) == [token for token in without_begins(stream) if token % 3 > 0]
    else:
        assert {*found} == {*without_begins(stream)}
        left = sorted(found)
        for token in without_begins(stream):
            left.remove(token)
        fewest = count * (context + 1) - sum(n + 1 for n in lengths)
        assert len(left) <= fewest


@given(documents, contexts, keys(), st.booleans())
@example([12], 8, random.key(0), False)
def test_a_segment_is_a_stretch_of_one_document_and_all_but_its_first_token_counts(corpus, lengths, context, key, pack):
    stream = corpus(lengths, context, pack)
    whole = stream.tokens.tolist()
    for row in segments(batch(stream, key, 0, (4, 8))):
        assert row
        for tokens, counts in row:
            if not pack:  # padding has no segment of its own
                tokens, counts = tokens[:1 + sum(counts)], counts[:1 + sum(counts)]
            start = whole.index(tokens[1]) - 1
            assert tokens[0] == BOS and tokens[1:] == whole[start + 1:start + len(tokens)] and BOS not in tokens[1:]
            assert counts == [False] + [True] * (len(tokens) - 1)


@given(documents, contexts, keys())
def test_packed_rows_of_texts_have_no_more_than_one_free_slot(corpus, lengths, context, key):
    made = batch(corpus(lengths, context), key, 1, (3, 5))
    assert ((made.segments < 0).sum(-1) <= 1).all()


@given(keys(), st.integers(1, 50))
def test_fewer_tokens_than_a_batch_are_enough(corpus, key, length):
    made = batch(corpus([length], 20), key, 7, (2, 16))
    assert made.mask.any(-1).all()


def test_documents_are_visited_evenly(corpus):
    """Every document, however short, comes once in each epoch: three epochs, in batches that do not fit in them."""
    lengths = [3, 7, 5, 1, 6, 30]
    stream = corpus(lengths, 8, learned=False)
    count = len(stream.rows.first) - 1
    found = [token for step in range(count) for token in predicted(batch(stream, random.key(3), step, (1, 3)))]
    assert torch.bincount(torch.tensor(found)).unique().tolist() == [0, 3]


def test_a_long_document_is_cut_at_other_places_in_other_epochs(corpus):
    stream = corpus([100], 8)  # 12 rows and a rest of 4
    count = len(stream.rows.first) - 1
    firsts = {int(made.tokens[0, 0, 1]) for epoch in range(40) for step in range(count)
              for made in [batch(stream, random.key(0), epoch * count + step, (1, 1))]}
    assert firsts >= {*range(3, 8)}


@pytest.mark.parametrize("step", [-1, 0.5, 2**60])
def test_a_step_out_of_range_is_an_error(corpus, step):
    with pytest.raises(ValueError, match="step|data"):
        batch(corpus([5], 3), random.key(0), step, (1, 1))


# --- and the model

def test_packed_or_one_a_row_the_loss_of_a_corpus_is_the_same(tmp_path, model, texts):
    encode_corpus(texts[:40], model.tokenizer, tmp_path / "a.bin")
    from llama_fn.training.loop import evaluate
    losses = [evaluate(model.params, open_corpus(tmp_path / "a.bin", model.tokenizer, 96, pack))
              for pack in (True, False)]
    assert abs(losses[0] - losses[1]) < 1e-5
    assert len(open_shard(tmp_path / "a.bin", model.tokenizer).ends) == 40


def test_a_step_of_packed_rows_is_a_step_of_their_documents(tmp_path, model, texts):
    encode_corpus(texts[:20], model.tokenizer, tmp_path / "a.bin")
    made = batch(open_corpus(tmp_path / "a.bin", model.tokenizer, 90), random.key(0), 0, (2, 3))
    params = lf.tree.map(torch.Tensor.double, model.params)
    step, state = make_step(lf.optim.sgd(0.5)), lf.optim.sgd(0.5).init(params)
    packed = step(params, state, *made)
    parts = [part for row in segments(made) for part in row]
    assert len(parts) >= 6
    tokens = torch.tensor([[ids + [0] * (91 - len(ids)) for ids, _ in parts]])
    mask = torch.tensor([[counts + [False] * (91 - len(counts)) for _, counts in parts]])
    alone = step(params, state, tokens, mask)
    assert packed[2].count == alone[2].count and torch.isclose(packed[2].loss, alone[2].loss)
    for x, y in zip(lf.tree.leaves(packed[0]), lf.tree.leaves(alone[0]), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-9)
