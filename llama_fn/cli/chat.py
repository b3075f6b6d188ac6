"""`llama-fn chat`: a conversation on the terminal."""

import contextlib
import itertools
import json
import secrets
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import tyro
from torch import Tensor

from llama_fn import random
from llama_fn.checkpoint.atomic import replacing
from llama_fn.checkpoint.load import Model, check_tokenizer
from llama_fn.cli import lines
from llama_fn.cli.errors import told
from llama_fn.cli.options import Context, Dtype, MaxNewTokens, model_of, within
from llama_fn.generation.conversation import (
    Chat,
    ContextFull,
    answer,
    ask,
    chat_of,
    dialog_of,
    drop,
    unanswered,
    with_system,
)
from llama_fn.generation.sampling import Sampler, sampler
from llama_fn.text import decode, parse
from llama_fn.transforms.quantize import Bits

HELP = """/system TEXT  put other words of the system at the beginning ("/system" alone takes them away)
/again        answer the last message once more
/drop N       forget the N oldest exchanges, and send what waits for their room; "/drop 0" forgets what waits
/reset        forget all of them, and what waits
/save FILE    write the conversation as JSON; --dialog FILE goes on with it
/quit         leave, as Ctrl-D does; Ctrl-C stops an answer
A pasted text is one message. So are all lines between two lines of three quotation marks."""


def chat(model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")], *, adapter: Path | None = None,
         system: str | None = None, dialog: Path | None = None, max_new_tokens: MaxNewTokens = None,
         context: Context = None,
         temperature: float = 0.6, top_k: int | None = None, top_p: float | None = 0.9, seed: int | None = None,
         dtype: Dtype = "stored", quantize: Bits | None = None, device: str = "auto") -> None:
    """Talk with a chat model, in LLaMA 2's format or by the chat template that lies with it (which takes jinja2). A
    pasted text is one message; so are the lines between two lines of three quotation marks. "/help" names the commands.

    Args:
        model: The folder of a chat model.
        adapter: A folder with a LoRA adapter of the model (adapter_config.json and adapter_model.safetensors, as PEFT
            writes them).
        system: What the system says before the conversation.
        dialog: Go on with a conversation that was written by /save.
        max_new_tokens: The longest answer; by default up to the end of the context.
        context: The most tokens of a conversation; by default as many as the model was trained for.
        temperature: Below 1 likelier, above 1 wilder; 0 is greedy.
        top_k: Draw from the k likeliest tokens.
        top_p: Draw from the likeliest tokens that together have probability p.
        seed: The same seed gives the same answers; by default another one every time.
        dtype: Compute in this dtype, or as the weights are stored.
        quantize: "int8" keeps the matrices in 8 bits: half the memory of bfloat16, and nearly the same text; "int4"
            in 4 bits, a quarter of it.
        device: Where to compute: "cpu", "cuda", ...; "auto" takes a GPU if there is one.
    """
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    sample = sampler(temperature, top_k, top_p)
    key = random.key(secrets.randbelow(2**32) if seed is None else seed)
    loaded = within(model_of(model, adapter, dtype, device, quantize), context)
    check_tokenizer(loaded)
    talk, waiting, count = (_read(loaded, dialog) if dialog else Chat()), [], itertools.count(1)
    if system is not None:
        talk = with_system(loaded, talk, system or None)
    with contextlib.suppress(ContextFull):
        ask(loaded, talk, "a")  # a chat template that cannot be rendered is told at once, and not of every message
    if loaded.tokenizer.chat_template == "":
        print(f"{model}: no chat template lies with this model; LLaMA 2's format is used", file=sys.stderr)
    read, terminal = lines.reader(), lines.on_terminal()
    if terminal:
        print("/help names the commands, Ctrl-C stops an answer, Ctrl-D leaves", file=sys.stderr)

    def reply(talk: Chat) -> Chat:
        return _reply(loaded, talk, random.fold_in(key, next(count)), max_new_tokens, sample)

    while True:
        try:
            text, is_line = lines.message(read)
        except EOFError:
            if terminal:
                print()
            break
        except KeyboardInterrupt:
            if not terminal:
                raise
            print("\nCtrl-D or /quit leaves", file=sys.stderr)
            continue
        except ValueError as error:  # a terminal's bytes in another encoding than its own
            print(told(error), file=sys.stderr)
            continue
        word = text.strip() if is_line else ""
        try:
            if word in ("/quit", "/exit"):
                break
            if word == "/again":
                talk = reply(unanswered(talk))
            elif word.startswith("/"):
                before = talk
                talk, waiting = _command(loaded, talk, waiting, word)
                if talk is not before:
                    talk, waiting = _send(loaded, talk, waiting, reply)
            elif text.strip():
                talk, waiting = _send(loaded, talk, [*waiting, text], reply)
        except BrokenPipeError:
            raise
        except (ValueError, OSError) as error:  # so does a bad command
            print(told(error), file=sys.stderr)
    if waiting:
        print(f"not sent, for want of room: {len(waiting)} message{'s' * (len(waiting) != 1)}", file=sys.stderr)


def _send(model: Model, talk: Chat, waiting: Sequence[str], reply: Callable[[Chat], Chat]) -> tuple[Chat, list[str]]:
    """The conversation after what waits was asked and answered, and what waits still, since the context is full."""
    for i, text in enumerate(waiting):
        try:
            talk = reply(ask(model, talk, text))
        except BrokenPipeError:
            raise
        except ContextFull as full:
            if not _fits(model, drop(model, talk, len(talk.exchanges)), text):
                print(f"{full}; the message alone is too long: shorten it", file=sys.stderr)
                continue
            print(f"{full}; {_offer(model, talk)}; then what waits is sent; /drop 0 forgets it", file=sys.stderr)
            return talk, list(waiting[i:])
        except (ValueError, OSError) as error:  # a bad message loses nothing but itself
            print(told(error), file=sys.stderr)
    return talk, []


def _reply(model: Model, talk: Chat, key: Tensor, max_new_tokens: int | None, sample: Sampler) -> Chat:
    """Stream the answer; Ctrl-C ends it where it is, and in a pipe everything."""
    try:
        with lines.held():
            for piece, so_far in answer(model, talk, key=key, max_new_tokens=max_new_tokens, sampler=sample):
                talk = so_far
                print(piece, end="", flush=True)
        print()
    except KeyboardInterrupt:
        print(" [stopped]")
        if not lines.on_terminal():
            raise
    count, context = len(talk.tokens), model.params.config.max_seq_len
    if count >= context - 1:
        print(f"[the context of {context} tokens is full; {_offer(model, talk)}]", file=sys.stderr)
    return talk


def _offer(model: Model, talk: Chat) -> str:
    """How many of the oldest exchanges can be dropped, and how many tokens each choice frees."""
    choices = [(n, len(talk.tokens) - len(drop(model, talk, n).tokens)) for n in range(1, len(talk.exchanges) + 1)]
    some = choices if len(choices) <= 4 else [*choices[:3], choices[-1]]
    return "; ".join(f"/drop {n} frees {tokens} tokens" for n, tokens in some)


def _fits(model: Model, talk: Chat, text: str) -> bool:
    try:
        ask(model, talk, text)
    except ContextFull:
        return False
    return True


def _command(model: Model, talk: Chat, waiting: list[str], line: str) -> tuple[Chat, list[str]]:
    """The conversation and what waits after a command."""
    word, _, rest = line.partition(" ")
    rest = rest.strip()
    if word == "/help":
        print(HELP, file=sys.stderr)
    elif word == "/reset":
        talk, waiting = Chat(talk.system), []
        print("a new conversation", file=sys.stderr)
    elif word == "/system":
        talk = with_system(model, talk, rest or None)
        print(f"the system says: {rest}" if rest else "the system says nothing", file=sys.stderr)
    elif word == "/drop" and rest == "0" and waiting:
        waiting = []
        print("what waited is forgotten", file=sys.stderr)
    elif word == "/drop":
        if not (rest.isdecimal() and len(rest) < 10) or not 1 <= int(rest) <= len(talk.exchanges):
            raise ValueError(f"/drop N forgets the N oldest of {len(talk.exchanges)} exchanges, got {rest!r}")
        before = len(talk.tokens)
        talk = drop(model, talk, int(rest))
        print(f"{before - len(talk.tokens)} tokens are free again", file=sys.stderr)
    elif word == "/save":
        _save(model, talk, rest)
    else:
        raise ValueError(f"unknown command {word}; /help names them")
    return talk, waiting


def _save(model: Model, talk: Chat, file: str) -> None:
    if not file:
        raise ValueError("/save needs the name of a file")
    if Path(file).exists():
        raise ValueError(f"{file} exists; choose another name")
    if not Path(file).parent.is_dir():
        raise ValueError(f"{Path(file).parent}: no such folder")
    with replacing(file) as beside:
        beside.write_text(json.dumps(dialog_of(model.tokenizer, talk), indent=2, ensure_ascii=False) + "\n",
                          encoding="utf-8")
    count = len(talk.exchanges)
    print(f"{file}: {count} exchange{'s' * (count != 1)}", file=sys.stderr)


def _read(model: Model, file: Path) -> Chat:
    where = f"{file}: not a conversation as /save writes it"
    dialog = parse(decode(file.read_bytes(), where), where)
    try:
        if not isinstance(dialog, list):
            raise ValueError('expected a list of {"role": ..., "content": ...}')
        return chat_of(model.tokenizer, dialog)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
