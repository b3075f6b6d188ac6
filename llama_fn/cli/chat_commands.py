"""The commands that a user types in `llama-fn chat`, as in "/drop 1"."""

import sys
from pathlib import Path

from llama_fn.checkpoint.load import Model
from llama_fn.generation.conversation import Chat, drop, with_system
from llama_fn.generation.conversation_file import write_chat

HELP = """/system TEXT  replace the system message; "/system" alone removes it
/again        answer the last message again
/drop N       drop the N oldest exchanges, and send the messages that wait for room; "/drop 0" discards those messages
/reset        drop all exchanges and all messages that wait
/save FILE    write the conversation as JSON; --dialog FILE continues it
/quit         leave, as Ctrl-D does; Ctrl-C stops an answer
A pasted text is one message. So are all lines between two lines of three quotation marks."""


def run_command(model: Model, chat: Chat, waiting: list[str], line: str) -> tuple[Chat, list[str]]:
    """The conversation after a command, and the messages that still wait for room in the context.

    Raises `ValueError` for an unknown command and for wrong arguments of a known one.
    """
    word, _, rest = line.partition(" ")
    rest = rest.strip()
    if word == "/help":
        print(HELP, file=sys.stderr)
    elif word == "/reset":
        chat, waiting = Chat(chat.system), []
        print("a new conversation", file=sys.stderr)
    elif word == "/system":
        chat = with_system(model, chat, rest or None)
        print(f"system message: {rest}" if rest else "no system message", file=sys.stderr)
    elif word == "/drop" and rest == "0" and waiting:
        waiting = []
        print("the waiting messages are discarded", file=sys.stderr)
    elif word == "/drop":
        if not (rest.isdecimal() and len(rest) < 10) or not 1 <= int(rest) <= len(chat.exchanges):
            raise ValueError(f"/drop N drops the N oldest of {len(chat.exchanges)} exchanges, got {rest!r}")
        before = len(chat.tokens)
        chat = drop(model, chat, int(rest))
        print(f"{before - len(chat.tokens)} tokens are free again", file=sys.stderr)
    elif word == "/save":
        if not rest:
            raise ValueError("/save needs the name of a file")
        write_chat(model.tokenizer, chat, Path(rest))
        print(f"{rest}: {counted(len(chat.exchanges), 'exchange')}", file=sys.stderr)
    else:
        raise ValueError(f"unknown command {word}; /help lists the commands")
    return chat, waiting


def ways_to_free(model: Model, chat: Chat) -> str:
    """How many of the oldest exchanges can be dropped, and how many tokens each choice frees."""
    choices = [(n, len(chat.tokens) - len(drop(model, chat, n).tokens)) for n in range(1, len(chat.exchanges) + 1)]
    some = choices if len(choices) <= 4 else [*choices[:3], choices[-1]]
    return "; ".join(f"/drop {n} frees {tokens} tokens" for n, tokens in some)


def counted(number: int, noun: str) -> str:
    """The number with its noun, as in "1 message" and "2 messages"."""
    return f"{number} {noun}{'s' * (number != 1)}"
