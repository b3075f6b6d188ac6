"""Reads text and JSON from bytes in UTF-8; errors name the file and the place in it."""

import codecs
import io
import json
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# UTF-32 comes first, because its little-endian mark begins with that of UTF-16.
OTHER_MARKS = ((codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32"), (codecs.BOM_UTF16_LE, "UTF-16"),
               (codecs.BOM_UTF16_BE, "UTF-16"))
# Which of 16 bytes are 0 where English text is in another encoding (RFC 4627, section 3).
OTHER_ZEROS = {b"\1\0" * 8: "UTF-16", b"\0\1" * 8: "UTF-16", b"\1\0\0\0" * 4: "UTF-32", b"\0\0\0\1" * 4: "UTF-32"}
PART = 1 << 22  # bytes of a text file that are read at a time
DIGITS = 4300  # of an integer; Python's own default limit


def decode(data: bytes, where: str) -> str:
    """The text of a whole file or pipe.

    A byte-order mark at the beginning is left out. Line ends become LF, as in Python's text mode: CRLF and CR are
    replaced. Raises `ValueError`, which begins with `where`, for bytes that are not UTF-8.
    """
    text = characters(data, where)
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def read_text(path: str | os.PathLike) -> str:
    """The text of a file, by `decode`."""
    return decode(Path(path).read_bytes(), str(path))


def text_parts(path: str | os.PathLike, size: int = PART) -> Iterator[str]:
    """The text of a file, by `decode`, in parts of at most about ``size`` bytes: each but the last ends with a line.

    At most two parts are in memory. A line that is longer is not cut.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    line_ends = io.IncrementalNewlineDecoder(None, translate=True)
    read, text = 0, ""
    with Path(path).open("rb") as file:
        while True:
            block = file.read(size)
            if read == 0 and (other := other_encoding(block)):
                raise ValueError(f"{path}: {other}")
            waiting = decoder.getstate()[0]
            skipped = len(codecs.BOM_UTF8) if read == 0 and block.startswith(codecs.BOM_UTF8) else 0
            try:
                new = decoder.decode(block[skipped:], final=not block)
            except UnicodeDecodeError as error:
                at = read + skipped - len(waiting) + error.start
                byte = error.object[error.start]
                raise ValueError(f"{path}: not UTF-8: byte 0x{byte:02X} at offset {at}; convert it to UTF-8 first"
                                 ) from None
            read += len(block)
            text += line_ends.decode(new, final=not block)
            if not block:
                yield text
                return
            if len(text) >= size and (end := text.rfind("\n") + 1):
                yield text[:end]
                text = text[end:]


def read_json(path: str | os.PathLike) -> Any:
    """The JSON value of a file, by `parse`."""
    return parse(decode(Path(path).read_bytes(), f"{path}: not JSON"), str(path))


def json_lines(path: str | os.PathLike) -> Iterator[tuple[str, Any]]:
    """The value of each line of a JSON-lines file, and its place ("FILE, line 3"). Blank lines are skipped."""
    with Path(path).open("rb") as lines:
        for number, line in enumerate(lines, 1):
            where = f"{path}, line {number}"
            text = characters(line, where, begins=number == 1)
            if text.strip():
                yield where, parse(text, where)


def parse(text: str, where: str) -> Any:
    """A JSON value (RFC 8259); NaN and Infinity are accepted, as many programs write them.

    Raises `ValueError`, which begins with `where`, for anything else, for a name given twice in one object, for an
    integer of more than 4300 digits, and for nesting that is too deep for Python.
    """

    def whole(digits: str) -> int:
        if len(digits.lstrip("-")) > DIGITS:
            raise ValueError(f"a whole number of {len(digits.lstrip('-')):,} digits; at most {DIGITS:,} are read")
        return int(digits)

    def named(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            ((twice, _),) = Counter(name for name, _ in pairs).most_common(1)
            raise ValueError(f"{twice!r} is given twice in one object")
        return value

    try:
        return json.loads(text, parse_int=whole, object_pairs_hook=named)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text.strip() else ""
        raise ValueError(f"{where}: not JSON: {error.msg} ({line}column {error.colno})") from None
    except RecursionError:
        raise ValueError(f"{where}: not JSON that can be read: it is nested too deep") from None
    except ValueError as error:
        raise ValueError(f"{where}: not JSON that can be read: {error}") from None


def other_encoding(data: bytes) -> str | None:
    """An error message for bytes that begin a file in UTF-16 or UTF-32; None for others."""
    name = next((name for mark, name in OTHER_MARKS if data.startswith(mark)), None)
    by = "its byte-order mark" if name else "its zero bytes"
    name = name or OTHER_ZEROS.get(bytes(byte != 0 for byte in data[:16]))
    return name and f"not UTF-8 but {name}, by {by}; convert it to UTF-8 first"


def characters(data: bytes, where: str, begins: bool = True) -> str:
    """The text of bytes, with line ends as they are.

    If the bytes begin a file, a byte-order mark is left out. Raises `ValueError`, which begins with `where`, for bytes
    that are not UTF-8.
    """
    mark = codecs.BOM_UTF8 if begins and data.startswith(codecs.BOM_UTF8) else b""
    if begins and (other := other_encoding(data)):
        raise ValueError(f"{where}: {other}")
    try:
        return data[len(mark):].decode()
    except UnicodeDecodeError as error:
        at = len(mark) + error.start
        raise ValueError(f"{where}: not UTF-8: byte 0x{data[at]:02X} at offset {at}; convert it to UTF-8 first"
                         ) from None


def visible(text: str) -> str:
    """The text for a terminal or a page, with U+FFFD in the place of every character that neither can show.

    These are control characters other than tabs and newlines, lone surrogates, and Unicode's noncharacters.
    """

    def shown(c: str) -> bool:
        nonsense = ord(c) & 0xFFFE == 0xFFFE or 0xFDD0 <= ord(c) <= 0xFDEF
        return c in "\t\n" or not (nonsense or unicodedata.category(c) in ("Cc", "Cs"))

    return "".join(c if shown(c) else "\ufffd" for c in text)
