"""Parameters on the device "meta": every result has its shape and dtype, and no number is computed."""

import torch
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import configs, token_rows

import llama_fn as lf


def kinds(tree) -> list:
    return [(x.shape, x.dtype) for x in lf.tree.leaves(tree)]


@given(configs(max_layers=1), st.integers(1, 4), st.integers(2, 6), st.sampled_from([torch.float32, torch.bfloat16]))
@example(lf.Config(48, 1, 6, 2, 77, 70), 3, 4, torch.bfloat16)
def test_meta_parameters_tell_all_shapes_and_dtypes(config, rows, count, dtype):
    there, meta = (lf.init_params(lf.random.key(0), config, dtype, device) for device in ("cpu", "meta"))
    tokens = token_rows(config, rows, count)
    optimizer = lf.optim.adamw(1e-3)

    def results(params: lf.Params, device: str) -> list:
        own = tokens.to(device)
        cache = lf.init_cache(config, (rows,), max_len=count + 3, dtype=dtype, device=device)
        logits, after = lf.forward(params, own, cache)
        grads, loss = torch.func.grad_and_value(lf.loss)(params, own)
        updates, state = optimizer.update(grads, optimizer.init(params), params)
        return [params, lf.forward(params, own)[0], cache, logits, after, lf.forward(params, own[:, :1], after),
                grads, loss, lf.loss_sum(params, own, torch.ones_like(own, dtype=torch.bool)), updates, state,
                lf.per_sample_grads(lf.loss, params, own), lf.lora.init(lf.random.key(0), params, rank=2)]

    told = results(meta, "meta")
    assert kinds(told) == kinds(results(there, "cpu"))
    assert all(x.is_meta for x in lf.tree.leaves(told[:-1]))
    assert lf.tree.structure(meta) == lf.tree.structure(there)


def test_a_model_of_seventy_billion_takes_no_memory():
    params = lf.init_params(lf.random.key(0), lf.LLAMA2_70B, torch.bfloat16, "meta")
    assert sum(x.numel() for x in lf.tree.leaves(params)) == lf.LLAMA2_70B.n_params
    tokens = torch.zeros(2, 4096, dtype=torch.int64, device="meta")
    assert lf.forward(params, tokens)[0].shape == (2, 4096, 32000)
