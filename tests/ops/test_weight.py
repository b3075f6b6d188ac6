"""What stands in a weight's place is checked as a tensor is."""

import pytest
import torch
from strategies import random_params

import llama_fn as lf
from llama_fn.transforms.adapter import Adapted

CONFIG = lf.Config(dim=48, n_layers=2, n_heads=6, n_kv_heads=2, vocab_size=77, hidden_dim=70)
PARAMS = random_params(CONFIG, lf.random.key(0), torch.float32)
TOKENS = torch.arange(5)


def with_wq(wq: object) -> lf.Params:
    block = PARAMS.blocks[0]
    return PARAMS._replace(blocks=(block._replace(attention=block.attention._replace(wq=wq)), *PARAMS.blocks[1:]))


def adapted(a: tuple[int, ...], b: tuple[int, ...]) -> Adapted:
    return Adapted(PARAMS.blocks[0].attention.wq, torch.ones(a), torch.ones(b))


@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize("part", ["values", "scale"])
def test_a_quantized_weight_with_wrong_axes_is_an_axes_error(bits, part):
    wq = lf.quantize(PARAMS, bits).blocks[0].attention.wq
    lf.forward(with_wq(wq), TOKENS)
    for wrong in (getattr(wq, part).transpose(0, 1), getattr(wq, part)[:1], getattr(wq, part)[None]):
        with pytest.raises(lf.AxesError, match="should be Float"):
            lf.forward(with_wq(wq._replace(**{part: wrong})), TOKENS)


@pytest.mark.parametrize(("a", "b"), [((4, 48), (2, 3, 8, 5)), ((5, 47), (2, 3, 8, 5)), ((5, 48), (3, 2, 8, 5)),
                                      ((5, 48), (2, 3, 5)), ((48,), (2, 3, 8))])
def test_an_adapter_with_wrong_axes_is_an_axes_error(a, b):
    lf.forward(with_wq(adapted((5, 48), (2, 3, 8, 5))), TOKENS)
    with pytest.raises(lf.AxesError, match="should be Float"):
        lf.forward(with_wq(adapted(a, b)), TOKENS)


def test_a_matrix_in_a_vectors_place_is_an_axes_error():
    output = lf.quantize(PARAMS, "int8").output
    for wrong in (PARAMS._replace(norm=output), PARAMS._replace(embedding=output)):
        with pytest.raises(lf.AxesError):
            lf.forward(wrong, TOKENS)
