"""What torch is doing is asked of the thread that asks."""

import threading

import torch

import llama_fn as lf
from llama_fn import modes
from llama_fn.model.linear import written_out
from llama_fn.ops import linear


def test_a_thread_that_runs_eagerly_while_another_traces_stays_eager():
    tracing, done, seen = threading.Event(), threading.Event(), []
    weight, x = torch.ones(3, 8), torch.ones(1, 8)
    params = lf.init_params(lf.random.key(0), lf.Config(48, 2, 6, 2, vocab_size=77, hidden_dim=70))
    alone = lf.forward(params, torch.arange(9))[0]

    def trace() -> None:
        with modes.tracing_layers():
            seen.append((modes.compiling(), linear.choose(weight, x, written_out).__name__ == "product"))
            tracing.set()
            done.wait(60)

    thread = threading.Thread(target=trace)
    thread.start()
    assert tracing.wait(60)
    seen.append((modes.compiling(), linear.choose(weight, x, written_out).__name__ == "product"))
    beside = lf.forward(params, torch.arange(9))[0]
    done.set()
    thread.join()
    assert seen == [(True, False), (False, True)] and torch.equal(beside, alone)
    assert not modes.compiling()
