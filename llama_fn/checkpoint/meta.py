"""Meta's own layout: `params.json` and `consolidated.00.pth`.

Its matrices are ours without the heads' axes; its RoPE pairs are interleaved, as ours are, so nothing is permuted.
"""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_fn import tree
from llama_fn.checkpoint.files import read_json, read_tensors, replacing
from llama_fn.config import Config
from llama_fn.model.init import Weight, abstract_params
from llama_fn.model.transformer import Params

HEADS = ("k", "g", "h")
FEED_FORWARD = {"w_gate": "w1", "w_down": "w2", "w_up": "w3"}
WEIGHTS = "consolidated.00.pth"
SETTINGS = "params.json"


def load_meta(folder: str | os.PathLike, dtype: torch.dtype | None = None,
              device: torch.device | str | None = None) -> Params:
    """The parameters of a folder in Meta's layout, in `dtype`, or if None in that of the file, without a copy.

    Raises `FileNotFoundError` for a missing file and `ValueError` for damaged ones, for settings that make no model,
    and for weights that are missing, unknown or of another shape than the settings say: all of them, in one error.
    """
    folder = Path(folder)
    settings = read_json(folder / SETTINGS)
    if len(shards := sorted(folder.glob("consolidated.*.pth"))) > 1:
        raise ValueError(f"{folder}: weights in {len(shards)} shards cannot be loaded yet, only {WEIGHTS} alone")
    state = {name: x for name, x in read_tensors(folder / WEIGHTS).items() if name != "rope.freqs"}
    config = read_config(settings, state, str(folder / SETTINGS))
    if config.n_layers > len(state):
        raise ValueError(f"{folder / SETTINGS}: n_layers is {config.n_layers}, but {WEIGHTS} has {len(state)} weights")
    abstract = abstract_params(config)
    _check_state(state, {meta_name(path): weight for path, weight in tree.paths(abstract).items()}, folder / WEIGHTS)
    return tree.map_with_path(
        lambda path, weight: state[meta_name(path)].reshape(weight.shape).to(device, dtype).detach(), abstract)


def save_meta(params: Params, folder: str | os.PathLike) -> None:
    """Write the parameters as Meta does: both files, or if anything fails neither."""
    folder = Path(folder)
    flat = tree.map(lambda weight, x: x.reshape(flat_shape(weight)).contiguous().cpu(),
                    abstract_params(params.config), params)
    state = {meta_name(path): x for path, x in tree.paths(flat).items()}
    with replacing(folder / SETTINGS) as settings, replacing(folder / WEIGHTS) as weights:
        torch.save(state, weights)
        settings.write_text(json.dumps(write_config(params.config), indent=2) + "\n")


def meta_name(path: str) -> str:
    """`blocks.0.feed_forward.w_gate` -> `layers.0.feed_forward.w1.weight`."""
    if path == "embedding":
        return "tok_embeddings.weight"
    *parents, last = path.split(".")
    parents = ["layers" if part == "blocks" else part for part in parents]
    return ".".join([*parents, FEED_FORWARD.get(last, last), "weight"])


def read_config(settings: dict[str, Any], state: dict[str, Tensor], where: str) -> Config:
    """The config of a `params.json`; what it leaves out is Meta's default, or is read off the weights."""
    if missing := [name for name in ("dim", "n_layers", "n_heads") if name not in settings]:
        raise ValueError(f"{where}: {', '.join(missing)} missing")
    vocab_size = settings.get("vocab_size", -1)
    if vocab_size == -1:  # as the released files say
        embedding = state.get("tok_embeddings.weight")
        vocab_size = len(embedding) if isinstance(embedding, Tensor) and embedding.ndim else 32000
    kv_heads = settings.get("n_kv_heads")
    try:
        return Config(
            dim=settings["dim"], n_layers=settings["n_layers"], n_heads=settings["n_heads"],
            n_kv_heads=settings["n_heads"] if kv_heads is None else kv_heads, vocab_size=vocab_size,
            hidden_dim=_hidden_dim(settings["dim"], settings.get("multiple_of", 256),
                                   settings.get("ffn_dim_multiplier")),
            norm_eps=settings.get("norm_eps", 1e-5), rope_theta=settings.get("rope_theta", 10000.0),
            max_seq_len=settings.get("max_seq_len", 4096))
    except (ValueError, OverflowError) as error:
        raise ValueError(f"{where}: {error}") from None


def write_config(config: Config) -> dict[str, Any]:
    """A `params.json`, which tells the hidden width by `multiple_of` and `ffn_dim_multiplier` only."""
    usual = 8 * config.dim // 3
    settings = dataclasses.asdict(config)
    settings["multiple_of"] = settings.pop("hidden_dim")
    if usual > config.hidden_dim:  # so that rounding down gives hidden_dim itself
        settings["ffn_dim_multiplier"] = (config.hidden_dim + 0.5) / usual
    return settings


def _hidden_dim(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Meta's rule: 2/3 of 4 d, times the multiplier, rounded up to a multiple."""
    for name, value in (("dim", dim), ("multiple_of", multiple_of)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    if multiplier is not None and (type(multiplier) not in (int, float) or not 0 < multiplier < math.inf):
        raise ValueError(f"ffn_dim_multiplier must be a number above 0, got {multiplier!r}")
    hidden = 8 * dim // 3
    if multiplier is not None:
        hidden = int(multiplier * hidden)
    return multiple_of * -(-hidden // multiple_of)


def flat_shape(weight: Weight) -> tuple[int, ...]:
    """The shape without the heads' axes: "k g h d" becomes (kgh, d) and "d k g h" becomes (d, kgh)."""
    sizes, last = [], ""
    for axis, size in zip(weight.axes.split(), weight.shape, strict=True):
        if axis in HEADS and last in HEADS:
            sizes[-1] *= size
        else:
            sizes.append(size)
        last = axis
    return tuple(sizes)


def _check_state(state: dict[str, Tensor], wanted: dict[str, Weight], file: Path) -> None:
    wrong = [f"missing: {name}" for name in wanted if name not in state]
    wrong += [f"unknown: {name}" for name in state if name not in wanted]
    for name, weight in wanted.items():
        x = state.get(name)
        if x is not None and not (isinstance(x, Tensor) and x.is_floating_point() and x.shape == flat_shape(weight)):
            given = f"{x.dtype}{list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            wrong.append(f"{name}: should be {list(flat_shape(weight))}, is {given}")
    if wrong:
        raise ValueError(f"{file}: {len(wrong)} weights do not fit the settings:\n  " + "\n  ".join(wrong))
