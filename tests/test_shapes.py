import os
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import Float, Int
from torch import Tensor

import llama_fn as lf
from llama_fn import AxesError, typed

sizes = st.integers(1, 5)
batches = st.lists(sizes, max_size=3).map(tuple)


@typed
def project(weight: Float[Tensor, "o d"], x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b o"]:
    return x @ weight.T


@typed
def untrue(x: Float[Tensor, "t d"]) -> Float[Tensor, "d t"]:
    return x


class Pair(NamedTuple):
    first: Float[Tensor, "d"]
    second: Float[Tensor, "d"]


@typed
def total(pairs: tuple[Pair, ...], bias: Float[Tensor, "d"] | None = None) -> tuple[Float[Tensor, "d"], int]:
    parts = [x for pair in pairs for x in pair] + ([] if bias is None else [bias])
    return sum(parts), len(parts)


def numbers(*shape: int) -> Tensor:
    """0, 1, 2, ...: their products and sums are exact."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)


def pair(first: int, second: int) -> Pair:
    return Pair(torch.ones(first), torch.ones(second))


@given(batches, sizes, sizes)
def test_axes_that_agree_pass(batch, o, d):
    assert project(torch.ones(o, d), torch.ones(*batch, d)).shape == (*batch, o)


@given(batches, sizes, sizes, sizes)
def test_an_axis_has_one_size_in_all_arguments(batch, o, d, other):
    x = torch.ones(*batch, other)
    if other == d:
        project(torch.ones(o, d), x)
        return
    with pytest.raises(AxesError) as error:
        project(torch.ones(o, d), x)
    for part in ("test_shapes.project", "argument `x`", "'*b d'", f"float32{list(x.shape)}", f"d={d}"):
        assert part in str(error.value)


@given(batches, sizes)
def test_too_few_axes_are_an_error(batch, d):
    with pytest.raises(AxesError, match="argument `weight`"):
        project(torch.ones(d), torch.ones(*batch, d))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_a_wrong_dtype_is_an_error(dtype):
    with pytest.raises(AxesError, match=rf"argument `x` .* got {str(dtype).removeprefix('torch.')}\[2, 3\]"):
        project(torch.ones(4, 3), torch.ones(2, 3, dtype=dtype))


def test_the_error_is_a_type_error_and_a_value_error():
    for kind in (TypeError, ValueError):
        with pytest.raises(kind):
            project(torch.ones(4, 3), None)


@given(sizes, sizes)
def test_the_result_is_checked_in_the_scope_of_the_arguments(t, d):
    if t == d:
        untrue(torch.ones(t, d))
        return
    with pytest.raises(AxesError, match=rf"untrue: the result should be .*'d t'.* got float32\[{t}, {d}\]"):
        untrue(torch.ones(t, d))


def test_a_result_is_checked_though_the_arguments_are_known():
    @typed
    def positive(x: Float[Tensor, "t"]) -> Float[Tensor, "t"]:
        return x[x > 0]

    positive(torch.tensor([1.0, 2.0]))
    with pytest.raises(AxesError, match="the result"):
        positive(torch.tensor([1.0, -2.0]))


def test_the_fields_of_a_named_tuple_are_checked_and_named():
    assert total((pair(3, 3), pair(3, 3)))[1] == 4
    for pairs, where in [((pair(3, 3), pair(3, 4)), "pairs.1.second"), ((pair(3, 3), (1, 2)), "pairs.1"),
                         ((pair(3, 3), pair(4, 4)), "pairs.1.first"), ([pair(3, 3)], "pairs")]:
        with pytest.raises(AxesError, match=f"argument `{where}` should be"):
            total(pairs)


def test_none_passes_where_it_may_and_only_there():
    assert total((pair(3, 3),), None)[1] == 2
    assert total((pair(3, 3),), torch.ones(3))[1] == 3
    for bias in (torch.ones(4), 5):
        with pytest.raises(AxesError, match="argument `bias`"):
            total((pair(3, 3),), bias)
    with pytest.raises(AxesError, match="argument `x`"):
        project(torch.ones(4, 3), None)


@pytest.mark.parametrize("parts, where", [(1, "the result"), (3, "the result"), (2, "the result's `1`")])
def test_the_parts_of_a_returned_tuple_are_checked_and_named(parts, where):
    @typed
    def several(x: Int[Tensor, "t"], count: int) -> tuple[Int[Tensor, "t"], int]:
        return (x, 1.5, x)[:count]

    with pytest.raises(AxesError, match=f"{where} should be"):
        several(torch.arange(4), parts)


def test_what_is_known_as_good_lets_nothing_else_pass():
    @typed
    def repeat(x: Float[Tensor, "t"], times: int, y: Float[Tensor, "t"] | None = None) -> Float[Tensor, "_"]:
        return x.repeat(int(times))

    x = torch.ones(3)
    for _ in range(2):
        repeat(x, 1, x)
    for bad in [(x, 1.0, x), (x, 1, x[1:]), (x.int(), 1, x), (x[:, None], 1, x), (x, "1", x), (None, 1, x)]:
        with pytest.raises(AxesError):
            repeat(*bad)


def test_an_integer_is_a_number_and_a_bool_is_none():
    @typed
    def scaled(x: Float[Tensor, "t"], by: float | None = None, times: Sequence[int] = (),
               named: dict[str, float] | None = None) -> float:
        return 0

    x = torch.ones(3)
    for _ in range(2):  # what is known does not let an equal value of another type pass
        for by in (1, 1.0, np.float32(1), np.int64(1), -(2**70), None):
            assert scaled(x, by) == 0
        scaled(x, 1, [1, np.int64(2)], {"a": 1, "b": 1.0})
        for wrong in ((x, True), (x, "1"), (x, 1j), (x, x), (x, 1, [True]), (x, 1, [1.0]), (x, 1, (), {"a": "1"})):
            with pytest.raises(AxesError):
                scaled(*wrong)


def keyed(x: Float[Tensor, "t"], *, key: int) -> None:
    pass


@pytest.mark.parametrize("args, named", [((), {"key": 1}), ((numbers(3),), {}), ((numbers(3), 2), {"key": 1}),
                                         ((numbers(3),), {"key": 1, "kay": 2}), ((numbers(3),), {"key": 1, "x": 2})])
def test_a_wrong_call_is_pythons_own_error(args, named):
    with pytest.raises(TypeError) as own:
        keyed(*args, **named)
    for call in (typed(keyed), lambda *a, **k: torch.vmap(lambda _: typed(keyed)(*a, **k))(numbers(2))):
        for _ in range(2):
            with pytest.raises(TypeError) as error:
                call(*args, **named)
            assert str(error.value) == str(own.value) and str(error.value).startswith("keyed() ")
            assert type(error.value) is TypeError and not error.value.__context__
            typed(keyed)(numbers(3), key=1)


def test_a_wrong_call_of_a_public_function_names_it(model):
    for call, message in [
        (lambda: lf.stream(model, "x"), r"stream\(\) missing 1 required keyword-only argument: 'key'"),
        (lambda: lf.forward(model.params), r"forward\(\) missing 1 required positional argument: 'tokens'"),
        (lambda: lf.forward(model.params, numbers(3), None, 4), r"forward\(\) takes from 2 to 3 positional arguments"),
        (lambda: lf.jit_layers()(model.params, tokes=3), r"forward\(\) got an unexpected keyword argument 'tokes'"),
    ]:
        with pytest.raises(TypeError, match=message):
            call()


def test_every_one_of_many_arguments_is_checked():
    @typed
    def both(*xs: Float[Tensor, "t"], **named: Float[Tensor, "t"]) -> None:
        pass

    x, wrong = torch.ones(3), torch.ones(4)
    both(x, x, a=x)
    for args, named in [((x, wrong), {}), ((x,), {"a": wrong}), ((x, 1), {})]:
        with pytest.raises(AxesError):
            both(*args, **named)


@given(sizes, sizes, sizes, sizes)
def test_under_vmap_the_axes_are_those_of_one_example(n, t, d, o):
    weight, xs = numbers(o, d), numbers(n, t, d)
    assert torch.equal(torch.vmap(project, (None, 0))(weight, xs), torch.stack([x @ weight.T for x in xs]))
    with pytest.raises(AxesError, match=rf"float32\[{t}, {d + 1}\]"):
        torch.vmap(project, (None, 0))(weight, torch.ones(n, t, d + 1))


@given(sizes, sizes, sizes)
def test_under_grad_the_axes_are_checked(t, d, o):
    weight, x = numbers(o, d), numbers(t, d)
    grads = torch.func.grad(lambda weight: project(weight, x).sum())(weight)
    assert torch.equal(grads, x.sum(0).expand(o, d))
    with pytest.raises(AxesError):
        torch.func.grad(lambda weight: project(weight, x).sum())(numbers(o, d + 1))


def test_a_typed_function_keeps_its_name_and_signature():
    assert project.__name__ == "project" and list(project.__annotations__) == ["weight", "x", "return"]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_in_a_compiled_function_the_raw_one_runs(backend):
    weight, x = numbers(4, 3), numbers(2, 3)
    compiled = torch.compile(lambda weight, x: project(weight, x) * 2, fullgraph=True, backend=backend)
    assert torch.equal(compiled(weight, x), x @ weight.T * 2)
    assert torch.compile(untrue, fullgraph=True, backend=backend)(x).shape == x.shape


@pytest.mark.slow
@pytest.mark.parametrize("value, status", [("0", 0), ("1", 1)])
def test_the_environment_turns_the_checks_off(value, status):
    code = ("import torch, llama_fn as lf\ntry: lf.random.split()\nexcept TypeError as error: print(error)\n"
            "lf.random.split(torch.zeros(3, dtype=torch.int64))")
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"LLAMA_FN_TYPED": value}, capture_output=True)
    assert done.returncode == status, done.stderr.decode()
    assert (b"AxesError" in done.stderr) == (value == "1")
    assert done.stdout == b"split() missing 1 required positional argument: 'key'\n"  # on or off
