"""`llama-fn chat`: a conversation on the terminal."""

import contextlib
import json
import secrets
import sys
from pathlib import Path
from typing import Annotated

import tyro
from torch import Tensor

from llama_fn import random
from llama_fn.checkpoint.atomic import replacing
from llama_fn.checkpoint.load import Model, check_tokenizer
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
/drop N       forget the N oldest exchanges
/reset        forget all of them
/save FILE    write the conversation as JSON; --dialog FILE goes on with it
/quit         leave, as Ctrl-D does; Ctrl-C stops an answer"""


def chat(model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")], *, adapter: Path | None = None,
         system: str | None = None, dialog: Path | None = None, max_new_tokens: MaxNewTokens = None,
         context: Context = None,
         temperature: float = 0.6, top_k: int | None = None, top_p: float | None = 0.9, seed: int | None = None,
         dtype: Dtype = "stored", quantize: Bits | None = None, device: str = "auto") -> None:
    """Talk with a chat model (one that was trained on LLaMA 2's chat format). "/help" names the commands.

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
    talk = _read(loaded, dialog) if dialog else Chat()
    if system is not None:
        talk = with_system(loaded, talk, system or None)
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):  # it gives `input` line editing and a history; Windows has its own
            import readline  # noqa: F401
        print("/help names the commands, Ctrl-C stops an answer, Ctrl-D leaves", file=sys.stderr)
    turn = 0
    while True:
        try:
            line = input("> " if terminal else "")
        except EOFError:
            break
        except KeyboardInterrupt:
            if not terminal:
                raise
            print("\nCtrl-D or /quit leaves", file=sys.stderr)
            continue
        turn += 1
        try:
            if line.strip() in ("/quit", "/exit"):
                return
            if line.strip() == "/again":
                talk = _reply(loaded, unanswered(talk), random.fold_in(key, turn), max_new_tokens, sample)
            elif line.startswith("/"):
                talk = _command(loaded, talk, line)
            elif line.strip():
                asked = _ask(loaded, talk, line, terminal)
                if asked is not None:
                    talk = _reply(loaded, asked, random.fold_in(key, turn), max_new_tokens, sample)
        except BrokenPipeError:
            raise
        except (ValueError, OSError) as error:  # a bad line loses nothing but itself
            print(error, file=sys.stderr)
    if terminal:
        print()


def _ask(model: Model, talk: Chat, line: str, terminal: bool) -> Chat | None:
    """The question put, after older exchanges were dropped if the context was full and the user agreed."""
    try:
        return ask(model, talk, line)
    except ContextFull as full:
        choices = _choices(model, talk)
        fits = next((n for n, _ in choices if _fits(model, drop(model, talk, n), line)), None)
        if fits is None:
            raise ValueError(f"{full}; the message alone is too long: shorten it") from None
        print(f"{full}; {_offer(choices)}", file=sys.stderr)
        if not terminal:
            raise ValueError("the message was not sent") from None
        while True:
            try:
                count = input(f"drop how many of the oldest exchanges? [{fits}, 0 keeps all] ").strip() or str(fits)
            except (EOFError, KeyboardInterrupt):
                print(file=sys.stderr)
                count = "0"
            if count == "0" or not count.isdecimal():
                print("the message was not sent", file=sys.stderr)
                return None
            try:
                return ask(model, drop(model, talk, int(count)), line)
            except ValueError as error:  # too few, or more than there are
                print(error, file=sys.stderr)


def _reply(model: Model, talk: Chat, key: Tensor, max_new_tokens: int | None, sample: Sampler) -> Chat:
    """Stream the answer; Ctrl-C ends it where it is, and in a pipe everything."""
    pieces = answer(model, talk, key=key, max_new_tokens=max_new_tokens, sampler=sample)
    try:
        for piece, so_far in pieces:
            talk = so_far
            print(piece, end="", flush=True)
        print()
    except KeyboardInterrupt:
        print(" [stopped]")
        if not sys.stdin.isatty():
            raise
    count, context = len(talk.tokens), model.params.config.max_seq_len
    if count >= context - 1:
        print(f"[the context of {context} tokens is full; {_offer(_choices(model, talk))}]", file=sys.stderr)
    return talk


def _choices(model: Model, talk: Chat) -> list[tuple[int, int]]:
    """How many of the oldest exchanges can be dropped, and how many tokens each choice frees."""
    return [(n, len(talk.tokens) - len(drop(model, talk, n).tokens)) for n in range(1, len(talk.exchanges) + 1)]


def _offer(choices: list[tuple[int, int]]) -> str:
    some = choices if len(choices) <= 4 else [*choices[:3], choices[-1]]
    return "; ".join(f"/drop {n} frees {tokens} tokens" for n, tokens in some)


def _fits(model: Model, talk: Chat, line: str) -> bool:
    try:
        ask(model, talk, line)
    except ContextFull:
        return False
    return True


def _command(model: Model, talk: Chat, line: str) -> Chat:
    word, _, rest = line.strip().partition(" ")
    if word == "/help":
        print(HELP, file=sys.stderr)
    elif word == "/reset":
        talk = Chat(talk.system)
        print("a new conversation", file=sys.stderr)
    elif word == "/system":
        talk = with_system(model, talk, rest.strip() or None)
        print(f"the system says: {rest.strip()}" if rest.strip() else "the system says nothing", file=sys.stderr)
    elif word == "/drop":
        if not rest.strip().isdecimal() or not 1 <= int(rest) <= len(talk.exchanges):
            raise ValueError(f"/drop N forgets the N oldest of {len(talk.exchanges)} exchanges, got {rest.strip()!r}")
        before = len(talk.tokens)
        talk = drop(model, talk, int(rest))
        print(f"{before - len(talk.tokens)} tokens are free again", file=sys.stderr)
    elif word == "/save":
        if not rest.strip():
            raise ValueError("/save needs the name of a file")
        if Path(rest.strip()).exists():
            raise ValueError(f"{rest.strip()} exists; choose another name")
        if not Path(rest.strip()).parent.is_dir():
            raise ValueError(f"{Path(rest.strip()).parent}: no such folder")
        with replacing(rest.strip()) as beside:
            beside.write_text(json.dumps(dialog_of(model.tokenizer, talk), indent=2, ensure_ascii=False) + "\n",
                              encoding="utf-8")
        count = len(talk.exchanges)
        print(f"{rest.strip()}: {count} exchange{'s' * (count != 1)}", file=sys.stderr)
    else:
        raise ValueError(f"unknown command {word}; /help names them")
    return talk


def _read(model: Model, file: Path) -> Chat:
    where = f"{file}: not a conversation as /save writes it"
    dialog = parse(decode(file.read_bytes(), where), where)
    try:
        if not isinstance(dialog, list):
            raise ValueError('expected a list of {"role": ..., "content": ...}')
        return chat_of(model.tokenizer, dialog)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
