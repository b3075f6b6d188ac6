"""Flip single bits in the folder of a stopped run, and cut its files short: every damage is named or without effect.

    python tests/flip_training.py [FLIPS] [SEED]

Each time the run is resumed and goes on to its end. There are three good outcomes: an error that names the file; a
warning that names a skipped snapshot, and the result of the undamaged run; or no word, and the result of the undamaged
run. The result is parameters, moments and metrics, bit for bit. A different result, or another kind of error, is bad.
"""

import random
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from runs import SMALL, copied, eager, result, stopped_run

import llama_fn as lf
from llama_fn.training.run import run

STOPPED = 6


def outcome(stopped: Path, place: Path, damaged: Path, damage: Callable[[bytes], bytes], whole: tuple) -> str:
    """What comes of a run that is resumed after `damage` was done to one of its files."""
    folder = copied(stopped, place / "damaged")
    file = folder / damaged.relative_to(stopped)
    file.write_bytes(damage(file.read_bytes()))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        lf.quiet.ignore()
        try:
            run(folder, SMALL, resume=True, evaluate_every=2)
        except (ValueError, OSError) as error:
            named = {file.name, file.parent.name, "run.json"}  # a snapshot is named by its folder
            assert any(name in str(error) for name in named), (file, error)
            return "named by an error"
    if result(folder) != whole:
        return f"BAD: {file.relative_to(folder)} led to another result, said {[str(x.message) for x in said]}"
    if said:
        assert any(file.parent.name in str(x.message) for x in said), (file, [str(x.message) for x in said])
        return "named by a warning, same result"
    return "without effect"


def flipped(draw: random.Random) -> Callable[[bytes], bytes]:
    def flip(data: bytes) -> bytes:
        at = draw.randrange(len(data))
        return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1:]
    return flip


def cut(part: int) -> Callable[[bytes], bytes]:
    return lambda data: data[:len(data) * part // 64]


def main(flips: int, seed: int, every_cut: int = 1) -> None:
    torch.set_num_threads(1)
    draw, root, patch = random.Random(seed), Path(tempfile.mkdtemp()), pytest.MonkeyPatch()
    eager(patch)
    stopped = stopped_run(root, step=STOPPED, evaluate_every=2)
    run(copied(stopped, root / "whole"), SMALL, resume=True, evaluate_every=2)
    whole = result(root / "whole")
    files = sorted(path for path in stopped.rglob("*") if path.is_file())
    by_kind = {kind: [path for path in files if path.match(kind)] for kind in (
        "state.safetensors", "manifest.json", "data/*.bin", "tokenizer.model", "run.json", "metrics.jsonl")}
    assert sorted(path for paths in by_kind.values() for path in paths) == files, files
    flips_drawn = ((kind, draw.choice(by_kind[kind]), flipped(draw)) for kind in draw.choices([*by_kind], k=flips))
    cuts = ((kind, path, cut(part)) for kind in by_kind for path in by_kind[kind] for part in range(0, 64, every_cut))
    bad = []
    for what, trials in (("flipped", flips_drawn), ("cut", cuts)):
        seen: dict[str, Counter] = {kind: Counter() for kind in by_kind}
        for kind, file, damage in trials:
            seen[kind][found := outcome(stopped, root, file, damage, whole)] += 1
            bad += [found] if found.startswith("BAD") else []
        print(f"{sum(counts.total() for counts in seen.values())} files {what}:")
        for kind, counts in seen.items():
            print(f"  {kind}: {dict(counts)}")
    assert not bad, bad


if __name__ == "__main__":
    main(*map(int, sys.argv[1:] or ("1000", "0")))
