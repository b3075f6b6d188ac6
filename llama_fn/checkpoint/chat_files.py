"""What the files beside a tokenizer say of dialogs: the chat template, what it calls tokens, and the tokens that end.

Hugging Face's folders have them. Where a model with them is saved in another format, they lie beside it in the same
files, for `load` to find.
"""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

from llama_fn.checkpoint.files import inside, read_json, write_json
from llama_fn.checkpoint.limits import check_size
from llama_fn.text import characters
from llama_fn.tokenizer import LARGEST_JSON, Tokenizer

TEMPLATE, ENDS, NAMES, CONFIG = "chat_template.jinja", "generation_config.json", "tokenizer_config.json", "config.json"
OLDER_TEMPLATE = "chat_template.json"
OTHER_TEMPLATES = "additional_chat_templates"  # a folder; each file in it is a template with a name
LARGEST_TEMPLATE = 1 << 22  # bytes; a long one, with tools, has 20,000
FILES = (TEMPLATE, OLDER_TEMPLATE, ENDS, NAMES)

# Meta's rules (see `generation/chat.py`) in Jinja. What stands for SPACE depends on the tokenizer.
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
    """The tokenizer with what the folder's files say. Raises `ValueError` for one that says nonsense, naming it."""
    names = _json(folder / NAMES)
    template = _template(folder, names)
    if template is None and (folder / CONFIG).exists():
        template = ""
    if template is not None and template.strip() == llama2_template(tokenizer).strip():
        template = None
    own = dict(_own_names(tokenizer))
    pairs = [(name, (value.get("content") if isinstance(value, dict) else value) or "") for name, value in names.items()
             if name.endswith("_token") and isinstance(value, str | dict | None)]
    others = tuple(pair for pair in pairs if isinstance(pair[1], str) and pair[1] != own.get(pair[0], ""))
    return dataclasses.replace(tokenizer, chat_template=template, end_ids=_end_ids(tokenizer, folder),
                               token_names=others)


def write_chat(tokenizer: Tokenizer, folder: Path, for_transformers: bool) -> None:
    """Write what `read_chat` reads; of `tokenizer_config.json`, which is there already or not, the names of tokens.

    A folder for transformers always tells the end tokens, and has LLaMA 2's template where Meta's rules are used.
    """
    template = tokenizer.chat_template
    if template is None and for_transformers:
        template = llama2_template(tokenizer)
    if template or (template is not None and not for_transformers):
        (folder / TEMPLATE).write_text(template, encoding="utf-8", newline="")
    ends = [id for id in (tokenizer.eos_id, *tokenizer.end_ids) if id >= 0]
    if for_transformers or tokenizer.end_ids:
        begin = {"bos_token_id": tokenizer.bos_id} if tokenizer.bos_id >= 0 else {}
        write_json(folder / ENDS, begin | {"eos_token_id": ends[0] if len(ends) == 1 else ends or None})
    if tokenizer.token_names:
        names = {name: text or None for name, text in tokenizer.token_names}
        write_json(folder / NAMES, _json(folder / NAMES) | names)


def llama2_template(tokenizer: Tokenizer) -> str:
    """LLaMA 2's chat template, which gives Meta's tokens. Its text needs a space after the begin token where the
    tokenizer puts one before a text, but not before a part of it.
    """
    begin = tokenizer.processor.id_to_piece(tokenizer.bos_id) if tokenizer.bos_id >= 0 else ""
    spaced = tokenizer.encode(f"{begin}[", bos=False, special=True)[bool(begin):] != tokenizer.encode("[", bos=False)
    return LLAMA2.replace("SPACE", " " * spaced)


def _own_names(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    ids = (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id),
           ("unk_token", tokenizer.processor.unk_id()))
    return [(name, tokenizer.processor.id_to_piece(id)) for name, id in ids if id >= 0]


def _json(file: Path) -> dict[str, Any]:
    return read_json(inside(file.parent, file.name), LARGEST_JSON) if file.exists() or file.is_symlink() else {}


def _template(folder: Path, names: dict[str, Any]) -> str | None:
    """The default template. A file of its own goes first, as for transformers. Others are left out, with a warning."""
    _warn_of_templates(folder / OTHER_TEMPLATES, [file.stem for file in (folder / OTHER_TEMPLATES).glob("*.jinja")])
    if (folder / TEMPLATE).exists() or (folder / TEMPLATE).is_symlink():
        file = inside(folder, TEMPLATE)
        check_size(file, LARGEST_TEMPLATE)
        return characters(file.read_bytes(), str(folder / TEMPLATE))
    older = _json(folder / OLDER_TEMPLATE)
    where, found = (OLDER_TEMPLATE, older) if "chat_template" in older else (NAMES, names)
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
    if names:
        warnings.warn(f"{where}: the chat templates {', '.join(sorted(names))} are left out; only the default one is "
                      "used and saved", stacklevel=2)


def _end_ids(tokenizer: Tokenizer, folder: Path) -> tuple[int, ...]:
    """The tokens that end a generation, besides the model's own end. Of none that is no token anything is said: it is
    never drawn.
    """
    for name in (ENDS, CONFIG):
        settings = _json(folder / name)
        ids = settings.get("eos_token_id")
        ids = ids if isinstance(ids, list) else [] if ids is None else [ids]
        if any(type(id) is not int for id in ids):
            raise ValueError(f"{folder / name}: eos_token_id should be a token's id or a list of such, got {ids!r}")
        if "eos_token_id" in settings:  # null: none, whatever `config.json` has
            return tuple(sorted({id for id in ids if 0 <= id < tokenizer.vocab_size} - {tokenizer.eos_id}))
    return ()
