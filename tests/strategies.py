"""Hypothesis strategies, what the laws are tried on; and what notes the operators that are called."""

import ctypes
import dataclasses
import math
import zlib

import torch
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import llama_fn as lf


@st.composite
def configs(draw, vocab_size: int | None = None, max_layers: int = 3) -> lf.Config:
    """Small configs whose axes all differ in size, with k, g > 1: a swapped axis cannot hide behind its equal."""
    k, g = draw(st.sampled_from([(2, 3), (3, 2), (2, 4), (4, 2), (3, 4), (4, 3)]))
    layers = draw(st.sampled_from([n for n in range(1, max_layers + 1) if n not in (k, g)]))
    h = draw(st.sampled_from([n for n in (6, 8, 10) if n != k * g]))
    taken = {k, g, layers, h, k * g, k * h, g * h, k * g * h, vocab_size}
    f = draw(st.integers(11, 99).filter(lambda n: n not in taken))
    v = vocab_size or draw(st.integers(11, 99).filter(lambda n: n not in taken | {f}))
    return lf.Config(dim=k * g * h, n_layers=layers, n_heads=k * g, n_kv_heads=k, vocab_size=v, hidden_dim=f,
                     norm_eps=draw(st.sampled_from([1e-5, 1e-6])), rope_theta=draw(st.sampled_from([1e4, 5e5])),
                     max_seq_len=64)


SCALINGS = [None, "linear", "llama3"]


def scaled(config: lf.Config, kind: str | None) -> lf.Config:
    """The config with RoPE scaling of a kind. "llama3" keeps the first frequency (16 turns or more), slows the second
    a little (2.5 turns), and divides the others (0.4 turns or fewer).
    """
    if kind is None:
        return config
    numbers = (1.0, 4.0, round(5 * math.pi * config.rope_theta ** (2 / config.head_dim))) if kind == "llama3" else ()
    return dataclasses.replace(config, max_seq_len=4096, rope_scaling=lf.RopeScaling(kind, 6.0, *numbers))


def scaled_configs(**limits) -> st.SearchStrategy[lf.Config]:
    """Configs without RoPE scaling, and of both kinds."""
    return st.builds(scaled, configs(**limits), st.sampled_from(SCALINGS))


def keys() -> st.SearchStrategy:
    """Random keys, of any seed."""
    return st.integers(0, 2**64 - 1).map(lf.random.key)


def leave_no_number_in_memory() -> None:
    """Free memory of NaN in all small sizes, which is what who asks for memory in this thread is given next (glibc)."""
    c = ctypes.CDLL(None)
    c.malloc.restype, c.free.argtypes, c.memset.argtypes = (ctypes.c_void_p, [ctypes.c_void_p],
                                                            [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t])
    for size in range(24, 1033, 16):
        pieces = [c.malloc(ctypes.c_size_t(size)) for _ in range(7)]
        for piece in pieces:
            c.memset(piece, 0xff, size)
            c.free(piece)


def unicode_texts(**limits) -> st.SearchStrategy[str]:
    """Text of any characters but lone surrogates, which UTF-8 cannot hold; every other one is common or a trap."""
    return st.text(st.sampled_from("  the0é漢😀\n\r\u2028\0") | st.characters(codec="utf-8"), **limits)


def random_params(config: lf.Config, key: torch.Tensor, dtype: torch.dtype = torch.float64) -> lf.Params:
    """Parameters that hide nothing: norms are not one, and the other weights large enough for sharp attention."""
    def spread(path: str, x: torch.Tensor) -> torch.Tensor:
        if x.ndim > 1:
            return 2 * x
        return x * lf.random.uniform(lf.random.fold_in(key, zlib.crc32(path.encode())), x.shape, dtype, 0.5, 1.5)

    return lf.tree.map_with_path(spread, lf.init_params(key, config, dtype))


@st.composite
def models(draw, dtype: torch.dtype = torch.float64, **limits) -> lf.Params:
    """Random parameters of a random config."""
    return random_params(draw(configs(**limits)), draw(keys()), dtype)


def token_rows(config: lf.Config, *shape: int, seed: int = 0) -> torch.Tensor:
    """Random tokens of a config's vocabulary."""
    return lf.random.bits(lf.random.key(seed), shape) * config.vocab_size >> 32


INSIDE = torch.ops.llama_fn.inside.default


class Calls(TorchDispatchMode):
    """The names of this package's operators, as they are called (but for the check of integers, which is no kernel)."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        self.names += [f.overloadpacket.__name__] if f.namespace == "llama_fn" and f is not INSIDE else []
        return f(*args, **(kwargs or {}))


def cache_for(params: lf.Params, batch: tuple[int, ...] = (), slots: int = 13) -> lf.Cache:
    """An empty cache of as many slots, of the parameters' dtype."""
    return lf.init_cache(params.config, batch, max_len=slots, dtype=params.norm.dtype)
