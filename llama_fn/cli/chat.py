"""`llama-fn chat`: a conversation on the terminal."""

import contextlib
import itertools
import secrets
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import tyro
from torch import Tensor

from llama_fn import random
from llama_fn.checkpoint.load import Model, check_tokenizer
from llama_fn.cli import lines
from llama_fn.cli.chat_commands import counted, run_command, ways_to_free
from llama_fn.cli.errors import description
from llama_fn.cli.options import Context, Dtype, MaxNewTokens, model_of, with_context
from llama_fn.generation.conversation import Chat, ContextFull, answer, ask, drop, unanswered, with_system
from llama_fn.generation.conversation_file import read_chat
from llama_fn.generation.sampling import Sampler, sampler
from llama_fn.transforms.quantize import Bits


def chat(model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")], *, adapter: Path | None = None,
         system: str | None = None, dialog: Path | None = None, max_new_tokens: MaxNewTokens = None,
         context: Context = None,
         temperature: float = 0.6, top_k: int | None = None, top_p: float | None = 0.9, seed: int | None = None,
         dtype: Dtype = "stored", quantize: Bits | None = None, device: str = "auto") -> None:
    """Talk with a chat model, in LLaMA 2's chat format or by the chat template in the model's folder.

    Chat templates need jinja2. A pasted text is one message. So are all lines between two lines of three quotation
    marks. "/help" lists the commands.

    Args:
        model: The folder of a chat model.
        adapter: A folder with a LoRA adapter of the model (adapter_config.json and adapter_model.safetensors, as PEFT
            writes them).
        system: The system message at the beginning of the conversation.
        dialog: A file that /save wrote; the conversation in it is continued.
        max_new_tokens: The most tokens of an answer; by default up to the end of the context.
        context: The most tokens of a conversation; by default as many as the model was trained for.
        temperature: Below 1, likely tokens become likelier; above 1, less so. 0 always takes the likeliest token.
        top_k: Draw from the k likeliest tokens.
        top_p: Draw from the likeliest tokens that together have probability p.
        seed: The same seed gives the same answers; by default a random seed.
        dtype: Compute in this dtype, or as the weights are stored.
        quantize: "int8" stores the matrices in 8 bits: half the memory of bfloat16, and nearly the same text. "int4"
            stores them in 4 bits, in a quarter of the memory.
        device: Where to compute: "cpu", "cuda", ...; "auto" takes a GPU if there is one.
    """
    if max_new_tokens is not None and max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    sample = sampler(temperature, top_k, top_p)
    key = random.key(secrets.randbelow(2**32) if seed is None else seed)
    loaded = with_context(model_of(model, adapter, dtype, device, quantize), context)
    check_tokenizer(loaded)
    conversation = read_chat(loaded.tokenizer, dialog) if dialog else Chat()
    waiting: list[str] = []
    turns = itertools.count(1)
    if system is not None:
        conversation = with_system(loaded, conversation, system or None)
    with contextlib.suppress(ContextFull):
        ask(loaded, conversation, "a")  # raise before the user types anything if the chat template cannot be rendered
    if loaded.tokenizer.chat_template == "":
        print(f"{model}: this model has no chat template; LLaMA 2's format is used", file=sys.stderr)
    read, terminal = lines.reader(), lines.on_terminal()
    if terminal:
        print("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves", file=sys.stderr)

    def reply(asked: Chat) -> Chat:
        return _reply(loaded, asked, random.fold_in(key, next(turns)), max_new_tokens, sample)

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
        except ValueError as error:  # the terminal sent bytes that are not in its encoding
            print(description(error), file=sys.stderr)
            continue
        word = text.strip() if is_line else ""
        try:
            if word in ("/quit", "/exit"):
                break
            if word == "/again":
                conversation = reply(unanswered(conversation))
            elif word.startswith("/"):
                before = conversation
                conversation, waiting = run_command(loaded, conversation, waiting, word)
                if conversation is not before:
                    conversation, waiting = _send(loaded, conversation, waiting, reply)
            elif text.strip():
                conversation, waiting = _send(loaded, conversation, [*waiting, text], reply)
        except BrokenPipeError:
            raise
        except (ValueError, OSError) as error:  # a wrong command changes nothing
            print(description(error), file=sys.stderr)
    if waiting:
        print(f"not sent, because the context is full: {counted(len(waiting), 'message')}", file=sys.stderr)


def _send(model: Model, conversation: Chat, waiting: Sequence[str],
          reply: Callable[[Chat], Chat]) -> tuple[Chat, list[str]]:
    """Send the messages that wait, one after another, and stream the answers.

    The results are the conversation, and the messages that still wait because the context is full.
    """
    for i, text in enumerate(waiting):
        try:
            conversation = reply(ask(model, conversation, text))
        except BrokenPipeError:
            raise
        except ContextFull as full:
            if not _fits(model, drop(model, conversation, len(conversation.exchanges)), text):
                print(f"{full}; the message alone is too long: shorten it", file=sys.stderr)
                continue
            print(f"{full}; {ways_to_free(model, conversation)}; the waiting messages are then sent; "
                  "/drop 0 discards them", file=sys.stderr)
            return conversation, list(waiting[i:])
        except (ValueError, OSError) as error:  # a message that cannot be sent is skipped
            print(description(error), file=sys.stderr)
    return conversation, []


def _reply(model: Model, conversation: Chat, key: Tensor, max_new_tokens: int | None, sample: Sampler) -> Chat:
    """Stream the answer. On a terminal Ctrl-C ends the answer; in a pipe it ends the program."""
    try:
        with lines.typing_waits():
            for piece, so_far in answer(model, conversation, key=key, max_new_tokens=max_new_tokens, sampler=sample):
                conversation = so_far
                print(piece, end="", flush=True)
        print()
    except KeyboardInterrupt:
        print(" [stopped]")
        if not lines.on_terminal():
            raise
    count, context = len(conversation.tokens), model.params.config.max_seq_len
    if count >= context - 1:
        print(f"[the context of {context} tokens is full; {ways_to_free(model, conversation)}]", file=sys.stderr)
    return conversation


def _fits(model: Model, conversation: Chat, text: str) -> bool:
    """Whether the context has room for a message and an answer."""
    try:
        ask(model, conversation, text)
    except ContextFull:
        return False
    return True
