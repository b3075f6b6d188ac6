"""The files that describe dialogs: the chat template, the names of tokens it uses, and the tokens that end an answer.

Folders in Hugging Face's format have these files. When a model with a chat template is saved in another format, the
same files are written next to its weights, and `lf.load` reads them from there.
"""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

from llama_fn.checkpoint.files import inside, read_json, write_json
from llama_fn.checkpoint.limits import check_size
from llama_fn.text import characters
from llama_fn.tokenizer import LARGEST_JSON, Tokenizer

CONFIG, GENERATION_CONFIG, TOKENIZER_CONFIG = "config.json", "generation_config.json", "tokenizer_config.json"
TEMPLATE, TEMPLATE_JSON = "chat_template.jinja", "chat_template.json"
OTHER_TEMPLATES = "additional_chat_templates"  # a folder with one file per named template
LARGEST_TEMPLATE = 1 << 22  # bytes; a long template, with tools, has 20,000
FILES = (TEMPLATE, TEMPLATE_JSON, GENERATION_CONFIG, TOKENIZER_CONFIG)

# LLaMA 2's format (see `generation/chat.py`) in Jinja. `llama2_template` replaces SPACE with a space or with nothing.
LLAMA2 = """\
{%- set first = 1 if messages[0]['role'] == 'system' else 0 -%}
{%- for message in messages[first:] -%}
    {%- set text = message['content'] -%}
    {%- if message['role'] != ('assistant' if loop.index0 % 2 else 'user') -%}
        {{- raise_exception('a dialog goes (system,) user, assistant, user, ...') -}}
    {%- endif -%}
    {%- if loop.first and first -%}
        {%- set text = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' + text -%}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {{- bos_token + 'SPACE[INST] ' + text.strip() + ' [/INST]' -}}
    {%- else -%}
        {{- ' ' + text.strip() + ' ' + eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""


def read_chat(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    """The tokenizer with the chat template, end tokens and token names that the folder's files give.

    Raises `ValueError` that names the file for a value of the wrong type. Warns of named templates, which are left
    out.
    """
    names = _json(folder / TOKENIZER_CONFIG)
    template = _template(folder, names)
    if template is None and (folder / CONFIG).exists():
        template = ""
    if template is not None and template.strip() == llama2_template(tokenizer).strip():
        template = None
    default_names = dict(_default_names(tokenizer))
    pairs = [(name, (value.get("content") if isinstance(value, dict) else value) or "") for name, value in names.items()
             if name.endswith("_token") and isinstance(value, str | dict | None)]
    others = tuple(pair for pair in pairs if isinstance(pair[1], str) and pair[1] != default_names.get(pair[0], ""))
    return dataclasses.replace(tokenizer, chat_template=template, end_ids=_end_ids(tokenizer, folder),
                               token_names=others)


def write_chat(tokenizer: Tokenizer, folder: Path, for_transformers: bool) -> None:
    """Write the files that `read_chat` reads.

    Token names are merged into ``tokenizer_config.json`` if that file exists already. A folder for transformers always
    gets the end tokens. It gets LLaMA 2's template if the tokenizer has no template of its own.
    """
    template = tokenizer.chat_template
    if template is None and for_transformers:
        template = llama2_template(tokenizer)
    if template or (template is not None and not for_transformers):
        (folder / TEMPLATE).write_text(template, encoding="utf-8", newline="")
    ends = [id for id in (tokenizer.eos_id, *tokenizer.end_ids) if id >= 0]
    if for_transformers or tokenizer.end_ids:
        begin = {"bos_token_id": tokenizer.bos_id} if tokenizer.bos_id >= 0 else {}
        write_json(folder / GENERATION_CONFIG, begin | {"eos_token_id": ends[0] if len(ends) == 1 else ends or None})
    if tokenizer.token_names:
        names = {name: text or None for name, text in tokenizer.token_names}
        write_json(folder / TOKENIZER_CONFIG, _json(folder / TOKENIZER_CONFIG) | names)


def llama2_template(tokenizer: Tokenizer) -> str:
    """LLaMA 2's chat template, which gives the same tokens as Meta's code.

    Some tokenizers put a space before a whole text but not before text that follows a special token. For those, the
    template itself has a space after the begin token.
    """
    begin = tokenizer.processor.id_to_piece(tokenizer.bos_id) if tokenizer.bos_id >= 0 else ""
    spaced = tokenizer.encode(f"{begin}[", bos=False, special=True)[bool(begin):] != tokenizer.encode("[", bos=False)
    return LLAMA2.replace("SPACE", " " * spaced)


def _default_names(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    """The names that the tokenizer itself gives to its begin, end and unknown token."""
    ids = (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id),
           ("unk_token", tokenizer.processor.unk_id()))
    return [(name, tokenizer.processor.id_to_piece(id)) for name, id in ids if id >= 0]


def _json(file: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no such file."""
    return read_json(inside(file.parent, file.name), LARGEST_JSON) if file.exists() or file.is_symlink() else {}


def _template(folder: Path, names: dict[str, Any]) -> str | None:
    """The default template, or None. As in transformers, ``chat_template.jinja`` wins over the JSON files.

    Warns of templates with other names, which are left out.
    """
    _warn_of_templates(folder / OTHER_TEMPLATES, [file.stem for file in (folder / OTHER_TEMPLATES).glob("*.jinja")])
    if (folder / TEMPLATE).exists() or (folder / TEMPLATE).is_symlink():
        file = inside(folder, TEMPLATE)
        check_size(file, LARGEST_TEMPLATE)
        return characters(file.read_bytes(), str(folder / TEMPLATE))
    older = _json(folder / TEMPLATE_JSON)
    where, found = (TEMPLATE_JSON, older) if "chat_template" in older else (TOKENIZER_CONFIG, names)
    template = found.get("chat_template")
    if isinstance(template, list) and all(isinstance(x, dict) and {"name", "template"} <= x.keys() for x in template):
        template = {x["name"]: x["template"] for x in template}
    if isinstance(template, dict):
        if "default" not in template:
            raise ValueError(f"{folder / where}: chat templates named {', '.join(map(str, template))}, and none is "
                             'named "default"')
        _warn_of_templates(folder / where, [str(name) for name in template if name != "default"])
        template = template["default"]
    if not isinstance(template, str | None):
        raise ValueError(f"{folder / where}: chat_template should be a text, or a list of named ones, got a "
                         f"{type(template).__name__}")
    return template


def _warn_of_templates(where: Path, names: list[str]) -> None:
    """Warn that the templates with these names are left out, if there are any."""
    if names:
        warnings.warn(f"{where}: the chat templates {', '.join(sorted(names))} are left out; only the default one is "
                      "used and saved", stacklevel=2)


def _end_ids(tokenizer: Tokenizer, folder: Path) -> tuple[int, ...]:
    """The tokens that end a generation, besides the tokenizer's own end token.

    Ids outside the vocabulary are ignored, because they are never sampled.
    """
    for name in (GENERATION_CONFIG, CONFIG):
        settings = _json(folder / name)
        ids = settings.get("eos_token_id")
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        if any(type(id) is not int for id in ids):
            raise ValueError(f"{folder / name}: eos_token_id should be a token's id or a list of such, got {ids!r}")
        if "eos_token_id" in settings:  # null means none; then `config.json` is not read
            return tuple(sorted({id for id in ids if 0 <= id < tokenizer.vocab_size} - {tokenizer.eos_id}))
    return ()
