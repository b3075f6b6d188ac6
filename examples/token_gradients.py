"""Gradients token by token: which tokens a prediction depends on, and which would teach the model most.

    python examples/token_gradients.py
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

import llama_fn as lf


@lf.typed
def saliency(params: lf.Params, tokens: Int[Tensor, "t"], target: int) -> Float[Tensor, "t d"]:
    """The gradient of log p(target | tokens) with respect to the embedding at each position (Simonyan et al. 2014).

    Equal tokens share a row of the table. Here each position gets its own: the tokens become 0 to t - 1, and the
    table's first t rows what they stood for (t may not exceed v).
    """
    def log_p(rows: Tensor) -> Tensor:
        table = torch.cat([rows, params.embedding[len(rows):]])
        return lf.forward(params._replace(embedding=table), torch.arange(len(rows)))[0][-1].log_softmax(-1)[target]

    return torch.func.grad(log_p)(params.embedding[tokens])


@lf.typed
def nats(params: lf.Params, tokens: Int[Tensor, "t"]) -> Float[Tensor, "t-1"]:
    """Each token's own loss, -log p(token | all before it); `jacrev` of it has one gradient a token."""
    return -lf.forward(params, tokens[:-1])[0].log_softmax(-1).gather(-1, tokens[1:, None])[:, 0]


if __name__ == "__main__":
    params, tokenizer = lf.load("stories")
    text = "Once upon a time there was a shy girl named Lily. She loved her red ball. One day, Lily took the red"
    tokens = torch.tensor(tokenizer.encode(text))
    depends = saliency(params, tokens[:-1], int(tokens[-1])).norm(dim=-1)
    teaches = torch.func.jacrev(lambda norm: nats(params._replace(norm=norm), tokens))(params.norm).norm(dim=-1)
    for what, scores, shown in (("depends on", depends, tokens[:-1]), ("learns from", teaches, tokens[1:])):
        print(what, [tokenizer.decode([int(shown[i])], continued=True) for i in scores.topk(3).indices])
