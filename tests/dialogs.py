"""Dialogs, Meta's rules for their tokens written out again, and answers that are played from a script."""

import dataclasses
from pathlib import Path

import torch
from hypothesis import strategies as st
from strategies import random_params, unicode_texts

import llama_fn as lf

spaces = st.sampled_from(["", " ", "\n", " \t\n"])
# U+2581 is how SentencePiece writes a space: a text with it is not the one that comes back. A tag is refused, and the
# name of a special token is plain text here but the token in transformers. (Hypothesis draws strings of the source.)
NAMES = ("\u2581", "[INST]", "<s>", "</s>", "<unk>")
words = unicode_texts(max_size=6).filter(lambda text: not any(name in text for name in NAMES))
questions = st.builds("{}{}{}".format, spaces, words, spaces)
answers = questions.filter(str.strip)
systems = st.none() | questions
turns = st.lists(st.tuples(questions, answers), max_size=2)


def dialog(system: str | None, turns: list[tuple[str, str]], *last: str) -> list[lf.Message]:
    """Messages: the system's, questions and answers in turns, and perhaps a last question."""
    said = [text for turn in turns for text in turn] + list(last)
    begin = [] if system is None else [{"role": "system", "content": system}]
    return begin + [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]


dialogs = st.builds(dialog, systems, turns, questions)


def meta_ids(tokenizer: lf.Tokenizer, dialog: list[lf.Message]) -> list[int]:
    """What Meta's `chat_completion` feeds the model: every exchange between <s> and </s>, the last question open."""
    said = [message["content"] for message in dialog]
    if dialog[0]["role"] == "system":
        said = ["<<SYS>>\n" + said[0] + "\n<</SYS>>\n\n" + said[1], *said[2:]]
    ids = []
    for question, answer in zip(said[::2], said[1::2], strict=False):
        text = f"[INST] {question.strip()} [/INST] {answer.strip()} "
        ids += [1, *tokenizer.processor.encode(text), 2]
    return [*ids, 1, *tokenizer.processor.encode(f"[INST] {said[-1].strip()} [/INST]")]


def talker(tokenizer: lf.Tokenizer, max_seq_len: int = 512, extra: int = 0) -> lf.Model:
    """A model in float64, in which a draw is the same whatever the order of sums; `extra` rows are for added tokens."""
    config = lf.Config(dim=48, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=tokenizer.processor.vocab_size() + extra,
                       hidden_dim=70)
    return lf.Model(random_params(dataclasses.replace(config, max_seq_len=max_seq_len), lf.random.key(1)), tokenizer)


def save_talker(tokenizer: lf.Tokenizer, max_seq_len: int, folder: Path) -> Path:
    """The folder of such a model, in float32; greedy, its answers have no end."""
    params = lf.tree.map(lambda x: x.float(), talker(tokenizer, max_seq_len).params)
    params.output[tokenizer.eos_id] = 0
    lf.save(lf.Model(params, tokenizer), folder)
    return folder


def own_tokens(tokenizer: lf.Tokenizer, answer: str) -> list[int]:
    """An answer's tokens as they stand in a dialog's."""
    return tokenizer.encode(answer.strip(), bos=False)


def plays(script: list[int], start: int, end: int = 2) -> lf.sampler:
    """A sampler whose tokens are those of a script from the position `start` on, and then `end`."""
    ids = torch.tensor([*script, end])

    def sample(key, logits, tokens):
        return torch.where(torch.arange(len(ids)) == (tokens >= 0).sum() - start, ids, 0).sum()

    return sample


def say(model: lf.Model, chat: lf.Chat, question: str, script: list[int]) -> lf.Chat:
    """The conversation after a question and an answer from a script."""
    asked = lf.ask(model, chat, question)
    *_, (_, answered) = lf.answer(model, asked, key=lf.random.key(0), max_new_tokens=len(script) + 1,
                                  sampler=plays(script, len(asked.tokens)))
    return answered


def told(model: lf.Model, system: str | None, turns: list[tuple[str, str]]) -> lf.Chat:
    """A conversation in which the answers' tokens are the tokenizer's own."""
    chat = lf.Chat(system)
    for question, answer in turns:
        chat = say(model, chat, question, own_tokens(model.tokenizer, answer))
    return chat


def drawn(model: lf.Model, chat: lf.Chat, key: torch.Tensor, count: int = 6) -> lf.Chat:
    """The conversation with an answer of the model's own."""
    *_, (_, chat) = lf.answer(model, chat, key=key, max_new_tokens=count)
    return chat


def text(model: lf.Model, chat: lf.Chat) -> str:
    """The last answer, without the space that belongs to its end."""
    return model.tokenizer.decode(chat.exchanges[-1].answer).rstrip(" ")


def said(chat: lf.Chat) -> tuple:
    """All of a conversation but its cache."""
    return chat.system, chat.exchanges


def copied(chat: lf.Chat) -> lf.Chat:
    return chat._replace(cache=lf.tree.map(torch.clone, chat.cache))


def same(a: lf.Chat, b: lf.Chat) -> bool:
    return said(a) == said(b) and all(
        torch.equal(*pair) for pair in zip(lf.tree.leaves(a.cache), lf.tree.leaves(b.cache), strict=True))
