"""Sphinx's settings for the page of the public names: `python -m sphinx -nW docs folder`.

A name in single backticks in a docstring is a reference, and a reference that leads nowhere is an error (`-nW`). The
function's own arguments are told apart here, and `lf` is read as `llama_fn`.
"""

import contextlib
import inspect
import re

import llama_fn as lf

project = "llama_fn"
version = release = lf.__version__
extensions = ["sphinx.ext.autodoc"]
html_theme_options = {"description": "LLaMA 2 as pure functions", "sidebar_width": "280px"}
html_show_copyright = html_show_sourcelink = False
default_role = "py:obj"
add_module_names = False
autodoc_member_order = "bysource"
python_maximum_signature_line_length = 90
# Types stand in signatures with their axes, and many are torch's or Python's: they are no references.
nitpick_ignore_regex = [("py:class", ".*"), ("py:data", ".*"), ("py:obj", r"(torch|jax|optax|numpy)\..*")]

suppress_warnings = ["ref.python"]  # Python's type `bytes`, which two classes have as a field, too


def references(app, what: str, name: str, thing, options, lines: list[str]) -> None:
    """Make a function's own arguments and what is no name literals, in place."""
    own: set[str] = set()
    with contextlib.suppress(TypeError, ValueError):  # data, and classes whose arguments are Python's own
        own |= set(inspect.signature(thing).parameters)

    def one(match: re.Match) -> str:
        text = match[1]
        if text in own or not re.fullmatch(r"[A-Za-z_][\w.]*", text):
            return f"``{text}``"
        return f"`{re.sub(r'^lf', 'llama_fn', text)}`" if text.startswith("lf.") else match[0]

    lines[:] = re.sub(r"(?<![`:\w])`([^`]+)`(?!`)", one, "\n".join(lines)).split("\n")


def setup(app) -> None:
    app.connect("autodoc-process-docstring", references)
