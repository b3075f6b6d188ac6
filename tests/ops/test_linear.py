"""The linear map's kernels: each computes what is written out, for every kind of weight, and is chosen where it may be.

A kernel's error is measured beside the sum of the terms' magnitudes, which is what rounding can add up to.
"""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import keys

import llama_fn as lf
from llama_fn.model.linear import linear as linear_map
from llama_fn.model.linear import written_out
from llama_fn.ops import linear
from llama_fn.ops.aten import linear as aten
from llama_fn.ops.aten.few_rows import few_rows
from llama_fn.ops.cpu import build
from llama_fn.ops.cpu import linear as cpu_linear
from llama_fn.ops.quantized import dequantized, grouped, quantized

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
KINDS = ("tensor", "int8", "int4")


def weight_of(kind: str, key: torch.Tensor, outer: tuple[int, ...], inner: tuple[int, ...], dtype: torch.dtype):
    exact = lf.random.normal(key, (*outer, *inner), torch.float64)
    return {"tensor": lambda w, _: w.to(dtype), "int8": quantized, "int4": grouped}[kind](exact, len(outer))


def plain(weight) -> torch.Tensor:
    return weight.double() if isinstance(weight, torch.Tensor) else dequantized(weight, torch.float64)


def near(y: torch.Tensor, weight, x: torch.Tensor, inputs: int = 1, roundings: int = 1, weights: int = 0) -> bool:
    """Whether y is the weight times x: in bfloat16 after so many roundings of a result, and of each weight."""
    w, x64 = plain(weight).flatten(-inputs), x.double().flatten(-inputs)
    flat = w.flatten(0, -2)
    exact, terms = (written_out(a, b).unflatten(-1, w.shape[:-1]) for a, b in ((flat, x64),
                                                                                    (flat.abs(), x64.abs())))
    unit, sums = {torch.float64: (0.0, 1e-13), torch.float32: (2**-24, 1e-5), torch.bfloat16: (2**-8, 1e-5)}[x.dtype]
    assert y.dtype == x.dtype and y.shape == exact.shape
    return bool(((y - exact).abs() <= 1.01 * roundings * unit * exact.abs() + (sums + weights * unit) * terms).all())


@st.composite
def maps(draw, kinds=KINDS, dtypes=DTYPES, step: int = 1, rows: st.SearchStrategy | None = None) -> tuple:
    """A flat weight "o d" of a kind, and rows "*b d"; d is a multiple of the step, and in four bits even."""
    kind, dtype, o = draw(st.sampled_from(kinds)), draw(st.sampled_from(dtypes)), draw(st.integers(1, 40))
    step = math.lcm(step, 2 if kind == "int4" else 1)
    d = step * draw(st.integers(1, 200 // step))
    batch = draw(rows or st.lists(st.integers(1, 4), max_size=3).map(tuple))
    one, two = lf.random.split(draw(keys()))
    return weight_of(kind, one, (o,), (d,), dtype), lf.random.normal(two, (*batch, d), torch.float64).to(dtype)


# --- each kernel


@given(maps())
def test_torchs_product_computes_what_is_written_out(drawn):
    weight, x = drawn
    assert near(linear.product(weight, x), weight, x, roundings=2, weights=1)


@given(maps(), st.integers(1, 50))
def test_pieces_compute_what_is_written_out_and_round_once(drawn, piece):
    weight, x = drawn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aten, "PIECE", piece)
        assert near(linear.in_pieces(weight, x), weight, x)


@given(maps(["int8"], [torch.bfloat16], step=16))
def test_torchs_own_8_bit_kernel_computes_what_is_written_out(drawn):
    weight, x = drawn
    assert near(linear.packed(weight, x), weight, x, roundings=2)  # the scale's and the result's


@given(st.one_of(maps(["tensor"]), maps(["int8"], step=4), maps(["int4"], step=64)), st.integers(1, 8), keys())
def test_sums_compute_what_is_written_out_and_round_once(drawn, rows, key):
    weight, x = drawn
    for batch in ((), (rows,), (1, rows)):
        some = lf.random.normal(key, (*batch, x.shape[-1]), torch.float64).to(x.dtype)
        assert near(few_rows(weight, some), weight, some)


@given(maps(), st.sampled_from([(), (1,), (1, 1)]), keys())
def test_one_row_as_a_gpu_sums_it_computes_what_is_written_out_and_rounds_once(drawn, batch, key):
    weight, x = drawn
    row = lf.random.normal(key, (*batch, x.shape[-1]), torch.float64).to(x.dtype)
    assert near(linear.sum_of_products(weight, row), weight, row)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compiling", [False, True])
def test_no_rows_have_no_outputs(monkeypatch, kind, compiling):
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", compiling)
    for dtype in (torch.float32, torch.bfloat16):
        weight = weight_of(kind, lf.random.key(0), (5,), (64,), dtype)
        assert linear_map(weight, torch.zeros((3, 0, 64), dtype=dtype)).shape == (3, 0, 5)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("inputs", [4096, 4098, 4099, 24_577, 49_155])
def test_sums_of_many_inputs_go_part_by_part(rows, inputs):
    one, two = lf.random.split(lf.random.key(inputs))
    weight, x = lf.random.normal(one, (5, inputs), torch.float64), lf.random.normal(two, (rows, inputs), torch.float64)
    assert near(few_rows(weight, x), weight, x)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 3])
def test_compiled_sums_are_those(rows, kind, dtype):
    torch.compiler.reset()  # or torch counts them all as one function's recompilations
    one, two = lf.random.split(lf.random.key(rows))
    weight, x = weight_of(kind, one, (37,), (192,), dtype), lf.random.normal(two, (rows, 192)).to(dtype)
    assert near(torch.compile(few_rows, fullgraph=True, dynamic=False)(weight, x), weight, x)


# --- the whole map, with the axes of heads


@given(keys(), st.sampled_from(KINDS), st.sampled_from(DTYPES), st.sampled_from([(), (1,), (3,), (2, 5), (70,)]),
       st.sampled_from([((5,), (16,)), ((5,), (34,)), ((2, 3, 4), (22,)), ((5,), (2, 3, 4)), ((7,), (3, 2, 24))]))
def test_heads_are_axes_of_the_inputs_or_of_the_outputs(key, kind, dtype, batch, axes):
    outer, inner = axes
    one, two = lf.random.split(key)
    weight = weight_of(kind, one, outer, inner, dtype)
    x = lf.random.normal(two, (*batch, *inner), torch.float64).to(dtype)
    assert near(linear_map(weight, x, len(inner)), weight, x, len(inner), roundings=2, weights=1)


# --- which kernel


def chosen(kind: str, dtype: torch.dtype, rows: int, d: int = 64, device: str = "cpu") -> str:
    weight = weight_of(kind, lf.random.key(0), (3,), (d,), dtype)
    x = torch.zeros((rows, d), dtype=dtype, device=device)
    return linear.choose(weight, x, written_out).__name__


@pytest.mark.parametrize(("kind", "dtype", "rows", "d", "eager", "compiled"), [
    ("tensor", torch.float32, 1, 63, "product", "few_rows"),
    ("tensor", torch.bfloat16, 1, 63, "product", "few_rows"),
    ("tensor", torch.bfloat16, 8, 63, "product", "few_rows"),
    ("tensor", torch.bfloat16, 1, 64, "product", "by_cpp"),
    ("tensor", torch.float32, 32, 64, "product", "by_cpp"),
    ("tensor", torch.bfloat16, 32, 64, "in_pieces", "by_cpp"),
    ("tensor", torch.bfloat16, 33, 64, "in_pieces", "in_pieces"),
    ("tensor", torch.float64, 8, 64, "product", "few_rows"),
    ("tensor", torch.bfloat16, 9, 63, "in_pieces", "in_pieces"),
    ("tensor", torch.float32, 9, 63, "product", "product"),
    ("int8", torch.bfloat16, 1, 64, "product", "by_cpp"),
    ("int8", torch.bfloat16, 2, 64, "packed", "by_cpp"),
    ("int8", torch.float16, 8, 64, "product", "by_cpp"),
    ("int8", torch.bfloat16, 8, 96, "packed", "few_rows"),  # no whole groups of inputs
    ("int8", torch.bfloat16, 9, 64, "packed", "packed"),
    ("int8", torch.bfloat16, 64, 64, "packed", "packed"),
    ("int8", torch.bfloat16, 65, 64, "in_pieces", "in_pieces"),
    ("int8", torch.bfloat16, 9, 56, "in_pieces", "in_pieces"),  # packed reads 16 inputs at a time
    ("int8", torch.bfloat16, 8, 63, "product", "product"),  # no whole words
    ("int8", torch.float32, 1, 64, "product", "few_rows"),
    ("int8", torch.float32, 9, 64, "product", "product"),
    ("int4", torch.bfloat16, 1, 128, "in_pieces", "by_cpp"),
    ("int4", torch.float32, 8, 128, "in_pieces", "few_rows"),
    ("int4", torch.float32, 8, 96, "in_pieces", "in_pieces"),  # no whole groups
    ("int4", torch.float32, 9, 128, "in_pieces", "in_pieces"),
])
def test_the_kernel_is_chosen_by_kind_rows_and_mode(monkeypatch, kind, dtype, rows, d, eager, compiled):
    monkeypatch.setattr(aten, "HAS_BFLOAT16", False)
    monkeypatch.setattr(build, "vector_instructions", lambda: "AVX2")
    assert chosen(kind, dtype, rows, d) == eager
    assert chosen(kind, dtype, rows, d, "meta") == "product"
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    assert chosen(kind, dtype, rows, d) == compiled
    assert chosen(kind, dtype, rows, d, "meta") == ("sum_of_products" if rows == 1 else "product")
    without = compiled if compiled != "by_cpp" else "few_rows" if rows <= 8 else eager
    monkeypatch.setattr(build, "vector_instructions", lambda: "AVX512")
    assert chosen(kind, dtype, rows, d) == compiled
    monkeypatch.setattr(build, "vector_instructions", lambda: "")  # a processor without AVX2
    assert chosen(kind, dtype, rows, d) == without
    monkeypatch.setattr(aten, "HAS_BFLOAT16", True)  # a good product of bfloat16 is torch's
    if kind != "int4" and compiled == "in_pieces":
        assert chosen(kind, dtype, rows, d) == "product"


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_integers_that_were_cast_are_not_read_as_bytes(kind):
    weight, x = weight_of(kind, lf.random.key(0), (3,), (64,), torch.float16), torch.ones(2, 64, dtype=torch.float16)
    assert cpu_linear.supports(weight, x) == bool(build.vector_instructions())
    for dtype in (torch.float16, torch.int16):
        assert not cpu_linear.supports(weight._replace(values=weight.values.to(dtype)), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scales_that_were_cast_are_not_read_as_words(monkeypatch, dtype):
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    weight, x = weight_of("int4", lf.random.key(0), (3,), (64,), dtype), torch.ones(2, 64, dtype=dtype)
    for scale in (weight.scale.to(torch.float16), weight.scale.float(), weight.scale.mT.contiguous().mT):
        other = weight._replace(scale=scale)
        terms = written_out(plain(other).abs(), x.double().abs())
        error = linear_map(other, x) - written_out(plain(other), x.double())
        assert (error.abs() <= {torch.float32: 1e-5, torch.float16: 2e-3}[dtype] * terms).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_mapped_or_differentiated_goes_through_torchs_product(monkeypatch, kind, dtype):
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True)
    weight, x, seen = weight_of(kind, lf.random.key(0), (3,), (64,), dtype), torch.ones(4, 64, dtype=dtype), []

    def f(row: torch.Tensor) -> torch.Tensor:
        seen.append(linear.choose(weight, row, written_out).__name__)
        return row.sum()

    torch.vmap(f)(x)
    torch.func.grad(f)(x)
    torch.func.jvp(f, (x,), (x,))
    f(x.clone().requires_grad_())
    assert seen == ["product"] * 4


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tensor", "int8", "int4"])
def test_an_exported_program_has_torchs_operators_alone(kind):
    class Map(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return linear_map(weight, x)

    weight, x = weight_of(kind, lf.random.key(0), (3,), (64,), torch.bfloat16), torch.ones(2, 64, dtype=torch.bfloat16)
    program = torch.export.export(Map(), (x,), strict=False)
    assert not any("llama_fn" in str(node.target) for node in program.graph.nodes)
    assert near(program.module()(x), weight, x, roundings=2)
