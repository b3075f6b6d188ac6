"""Torch's private names that this package uses, except those of the compiler (`private_inductor`) and of `tree`.

They change without notice, so look here first when a new torch comes out (`pyproject.toml` has the range that was
tried). Each name comes with its reason, and with what replaces it in a torch that lacks it.
"""

import functools
import importlib
import operator
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

MISSING: list[str] = []  # names below that this torch does not have


def _found(module: str, name: str, otherwise: Any) -> Any:
    try:
        return operator.attrgetter(name)(importlib.import_module(module))
    except (ImportError, AttributeError):
        MISSING.append(f"{module}.{name}")
        return otherwise


# --- What torch is doing. No public name tells all of it. In a torch without these names, less is known.

is_wrapped = _found("torch._C", "_functorch.is_functorch_wrapped_tensor", lambda x: type(x) is not Tensor)
is_mapped = _found("torch._C", "_functorch.is_batchedtensor", lambda x: False)
_beneath = _found("torch._C", "_functorch.get_unwrapped", None)
_interpreters = _found("torch._C", "_functorch.get_interpreter_stack", lambda: None)
_kinds = _found("torch._C", "_functorch.TransformType", SimpleNamespace(Grad="grad", Jvp="jvp", Vmap="vmap"))
_vmap = _found("torch._C", "_functorch.CVmapInterpreterPtr", None)
_dispatch_mode = _found("torch._C", "_get_dispatch_mode", lambda key: None)
_proxy = _found("torch._C", "_TorchDispatchModeKey.PROXY", None)  # of `make_fx`, under which `is_compiling()` is false
autocast = _found("torch._C", "_is_any_autocast_enabled", torch.is_autocast_enabled)
DispatchMode: Any = _found("torch.utils._python_dispatch", "TorchDispatchMode", object)
FakeTensor = _found("torch._subclasses", "FakeTensor", ())


def is_mapped_within(x: Tensor) -> bool:
    """Whether one of the active `vmap`s maps the tensor, also one outside of a gradient. Dynamo cannot tell: False."""
    if torch.compiler.is_dynamo_compiling():
        return False
    while is_wrapped(x) and _beneath is not None:
        if is_mapped(x):
            return True
        x = _beneath(x)
    return is_mapped(x)


def graph_is_made() -> bool:
    """Whether `make_fx` traces."""
    return _dispatch_mode(_proxy) is not None


def levels() -> int:
    """How many of torch.func's transforms are active."""
    return len(_interpreters() or ())


def gradients() -> int:
    """How many of the active transforms are gradients."""
    return sum(interpreter.key() == _kinds.Grad for interpreter in _interpreters() or ())


def tangents() -> bool:
    """Whether one of the active transforms is forward mode."""
    return any(interpreter.key() == _kinds.Jvp for interpreter in _interpreters() or ())


def mapped_sizes() -> list[int]:
    """The sizes of the axes that are mapped, outermost first."""
    return [_vmap(interpreter).batchSize() for interpreter in _interpreters() or () if interpreter.key() == _kinds.Vmap]


def dual_numbers() -> bool:
    """Whether a `torch.autograd.forward_ad.dual_level` is entered."""
    return getattr(forward_ad, "_current_level", -1) >= 0


def known_while_tracing(f: Callable) -> Callable:
    """Let dynamo run `f` while it traces, and take the result for a constant.

    This is `torch.compiler.assume_constant_result` without its import, which takes a second. Dynamo looks for the mark
    on the function, so this is the only attribute that the package puts on one.
    """
    f._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return f


def version(x: Tensor) -> int:
    """How often the tensor was written to in place."""
    return x._version


# --- An operator's derivatives and batching rules at one level of transforms. `torch.library` offers none there.

level = _found("torch._C", "_functorch.maybe_current_level", lambda: None)
_add_axis = _found("torch._C", "_functorch._add_batch_dim", None)
_take_axis = _found("torch._C", "_functorch._unwrap_batched", None)
below_autograd = _found("torch._C", "_AutoDispatchBelowAutograd", nullcontext)
OneLevelFunction = _found("torch.autograd.function", "_SingleLevelFunction", torch.autograd.Function)
one_level_of_autograd = _found("torch._functorch.utils", "enable_single_level_autograd_function", nullcontext)


def rules_can_be_set() -> bool:
    """Whether this torch has all names that a batching rule needs. Otherwise torch's own is right but slower."""
    return None not in (_add_axis, _take_axis, _found("torch._functorch.pyfunctorch",
                                                      "retrieve_current_functorch_interpreter", None))


def mapped_size() -> int:
    """The size of the axis that the innermost `vmap` maps."""
    from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

    return cast(Any, retrieve_current_functorch_interpreter()).batch_size()  # declared for vmap's interpreter alone


def take_axis(x: Tensor, level: int) -> tuple[Tensor, int | None]:
    """The tensor beneath a mapped tensor, and which of its axes is mapped."""
    return _take_axis(x, level)


def add_axis(x: Tensor, level: int) -> Tensor:
    """The inverse of `take_axis`: the first axis becomes the mapped one."""
    return _add_axis(x, 0, level)


def below_vmap() -> AbstractContextManager:
    """Within it, operators run as they do outside of `vmap`."""
    return torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchBatched))


# --- Kernels

flash_attention = _found("torch", "ops.aten._scaled_dot_product_flash_attention_for_cpu", None)
flash_attention_backward = _found("torch", "ops.aten._scaled_dot_product_flash_attention_for_cpu_backward", None)


@known_while_tracing
def flash_attention_allowed() -> bool:
    """Whether torch may choose flash attention: `torch.nn.attention.sdpa_kernel` can forbid it, on the CPU, too."""
    return flash_attention is not None and torch.backends.cuda.flash_sdp_enabled()


def copy_each(to: list[Tensor], values: list[Tensor]) -> None:
    """Copy each value into the tensor at the same index of `to`; on a GPU, by one kernel."""
    if (together := getattr(torch, "_foreach_copy_", None)) is not None:
        together(to, values)
        return
    for x, value in zip(to, values, strict=True):
        x.copy_(value)


def multiplies_bfloat16() -> bool:
    """Whether oneDNN's products of bfloat16 are fast: the processor has instructions for them.

    If torch cannot say, they are assumed to be fast.
    """
    known = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    return torch.backends.mkldnn.is_available() and known()


def times_bytes(rows: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Rows "r d" times an 8-bit weight "o d" with scales "o", without a copy of the weight in the rows' dtype."""
    return torch._weight_int8pack_mm(rows, weight, scale)  # pyright: ignore[reportPrivateImportUsage]


def onednn_product(a: Tensor, b: Tensor) -> Tensor:
    """Multiply two float32 matrices on the CPU by oneDNN, whatever their strides."""
    return torch.ops.mkldnn._linear_pointwise(a, b.mT, None, "none", [], "")


def computes_by_number(target: Any) -> bool:
    """Whether an operator of a graph makes each number of its result from one number of each argument."""
    return target is torch.ops.aten._to_copy.default or torch.Tag.pointwise in target.tags


# --- Dynamo, the tracer of `torch.compile`

_bypass = _found("torch._higher_order_ops.wrap", "dynamo_bypassing_wrapper", None)


def outside_of_dynamo(make: Callable, f: Callable, *args: Any, **kwargs: Any) -> Any:
    """`make(f)(*args, **kwargs)`, where dynamo traces `f` alone, and neither `make` nor what it makes.

    Dynamo would drop the backward of an `autograd.Function`. In a torch without this name, `f` is traced as it is.
    """
    return f(*args, **kwargs) if _bypass is None else _bypass(make, f, *args, **kwargs)


def untraced(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f` of tensors and plain values, which dynamo calls as it is: the backend traces it, with all its derivatives.

    Under `torch.func`, dynamo drops the backward and the `vmap` of an `autograd.Function` without a word (torch 2.13).
    """
    @known_while_tracing
    def allow() -> bool:  # when dynamo runs, because its import takes a second
        torch.compiler.allow_in_graph(f)
        return True

    @functools.wraps(f)
    def called(*args: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            allow()
        return f(*args)

    return called


def allow_shapes(count: int) -> None:
    """Let dynamo compile a function for at least so many shapes. By default it gives up after 8."""
    import torch._dynamo.config as config

    if hasattr(config, "recompile_limit"):
        config.recompile_limit = max(config.recompile_limit, count)


# --- Collectives that a graph may contain: functions of a tensor and a group's name, each with a result to wait for.

collective: Any = _found("torch.ops", "_c10d_functional", None)
