"""Every row of a table of kernels computes what the definition computes, and each is seen to be accepted."""

from contextlib import nullcontext

import pytest
import torch

import llama_fn as lf
from llama_fn.model import attention, linear
from llama_fn.modes import tracing_layers
from llama_fn.ops import attend as attends
from llama_fn.ops import linear as linears
from llama_fn.ops.aten import linear as aten
from llama_fn.ops.cpu import build
from llama_fn.ops.quantized import dequantized, grouped, quantized


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return lf.random.normal(lf.random.key(seed), shape).to(dtype)


def products(row: str):
    """A weight and rows that a row of the linear table accepts."""
    weight, x = normal(1, 24, 64), normal(2, 3, 64)
    return {"packed": (quantized(weight, 1), x.bfloat16()),
            "in_pieces": (grouped(weight, 1), x)}.get(row, (weight, x))


def slots(row: str):
    """Queries, keys, values and positions that a row of the attention table accepts."""
    t = {"in_blocks": 3 * attends.aten.BLOCK // 2, "fused": 5, "many_by_cpp": 5}.get(row, 1)
    return (normal(3, 2, 3, t, 8), normal(4, 2, t + 9, 8), normal(5, 2, t + 9, 8), torch.arange(t) + 4)


def there(row: str) -> None:
    if row in ("by_triton", "sum_of_products") and not torch.cuda.is_available():
        pytest.skip("a row for GPUs")
    if row.endswith("by_cpp") and not build.vector_instructions():
        pytest.skip("a row for processors with AVX2")


def named(table, *names: str):
    return [pytest.param(row, name, id=name) for row, name in zip(table, names, strict=True)]


@pytest.mark.parametrize(("row", "name"), named(
    linears.TABLE, "by_triton", "by_cpp", "sum_of_products", "few_rows", "packed", "in_pieces", "product"))
def test_a_row_of_the_linear_table_is_the_definition(row, name):
    there(name)
    assert row.compute.__name__ == name
    weight, x = products(name)
    with tracing_layers() if row.compiled else nullcontext():
        assert row.accepts(weight, x)
        y = row.compute(weight, x)
    plain = weight if isinstance(weight, torch.Tensor) else dequantized(weight)
    exact = linear.written_out(plain.double(), x.double())
    atol = 1e-4 if x.dtype == torch.float32 else 0.02 * exact.abs().max().item()
    assert torch.allclose(y.double(), exact, atol=atol, rtol=0)


@pytest.mark.parametrize(("row", "name"), named(
    attends.TABLE, "by_triton", "by_cpp", "many_by_cpp", "one_query", "in_blocks", "fused"))
def test_a_row_of_the_attention_table_is_the_definition(row, name):
    there(name)
    arguments = slots(name)
    with tracing_layers() if row.compiled else nullcontext():
        assert row.accepts(*arguments)
        heads = row.compute(*arguments)
    exact = attention.written_out(*(x.double() for x in arguments[:3]), arguments[3])
    assert torch.allclose(heads.double(), exact, atol=1e-5, rtol=0)


def test_eager_code_asks_no_row_that_is_for_compiled_steps(monkeypatch):
    def asked(*_):
        raise AssertionError("a row for compiled steps was asked")

    for ops in (linears, attends):
        monkeypatch.setattr(ops, "TABLE", tuple(row._replace(accepts=asked) if row.compiled else row
                                                for row in ops.TABLE))
    weight, x = products("product")
    assert linears.choose(weight, x, linear.written_out) is aten.product
    attends.attend(attention.written_out, *slots("fused"))
    with tracing_layers(), pytest.raises(AssertionError, match="was asked"):
        linears.choose(weight, x, linear.written_out)
