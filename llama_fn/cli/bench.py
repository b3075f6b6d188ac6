"""`llama-fn bench`: measurements of speed, taken here and now."""

import json

import tyro

from llama_fn.bench.measure import What, machine, measure
from llama_fn.bench.work import Work


def bench(what: tyro.conf.Positional[What] = "checks", *, work: Work = Work(), only: tuple[str, ...] = (),  # noqa: B008
          rounds: int = 11, json_out: bool = False) -> None:
    """Time llama_fn against something else, both in turn and in one run, and print medians with their quartiles.

    A ratio is the median of the ratios of single rounds. Where their quartiles lie more than a factor of 1.5 apart,
    "unclear" is printed and no median.

    Args:
        what: "checks": one eager decode step of the stories' model with and without the checks of axes.
            "transforms": per-sample gradients and their norms, vmap against a batch, adapters, recomputation and
            speculative decoding.
            "decode", "prefill", "train": one step, against the speed of this machine's memory or matrix products.
            "startup": the seconds that a new process takes to its first token.
        only: The names of single measurements; for "transforms" only.
        rounds: How often each is timed.
        json_out: Print the figures as JSON.
    """
    place = machine(what, work)
    tables = measure(what, work, only, rounds)
    if json_out:
        print(json.dumps({"machine": place, **tables}, indent=1))
        return
    print(place)
    for title, figures in tables.items():
        print(f"\n{title}")
        for name, figure in figures.items():
            print(f"  {name:58} {figure}")
