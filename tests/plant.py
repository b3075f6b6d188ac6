"""Plant the bugs of every `planted.toml` in a copy of the tree, one at a time, and see that the test named finds each.

    python tests/plant.py                     # every record (an hour or two)
    python tests/plant.py model ops           # the records of these rooms
    python tests/plant.py rope.py "at one"    # the records with these words in their file, test or reason
    python tests/plant.py --changed           # the records of files that differ from the last commit
    python tests/plant.py --mutate llama_fn/model --every 5    # every fifth mutant, against the room's tests

The exit status is 1 if a bug survives: if its test passes, or if its words do not stand exactly once in the file.
"""

import argparse
import itertools
import math
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import copies
import mutants

ROOT = Path(__file__).parent.parent
tree = ROOT  # in a worker, its copy
finders: list[str] = []  # in a worker, the tests that found mutants, the latest first


class Bug(NamedTuple):
    """One record: `words` stand once in `file`, and with `instead` in their place `test` fails."""

    room: str
    file: str
    words: str
    instead: str
    test: str
    why: str

    @property
    def where(self) -> str:
        """The test, as pytest takes it in the root of the tree."""
        return Path("tests", self.room, self.test).as_posix()


def records(root: Path = ROOT) -> list[Bug]:
    """Those of every room, in the order of the files."""
    files = sorted((root / "tests").rglob("planted.toml"))
    return [Bug(file.parent.relative_to(root / "tests").as_posix(), **record)
            for file in files for record in tomllib.loads(file.read_text())["bug"]]


def planted(bug: Bug, root: Path) -> str:
    """The file with the bug in it. Raises `ValueError` where its words do not stand exactly once."""
    text = (root / bug.file).read_text()
    if (count := text.count(bug.words)) != 1:
        raise ValueError(f"its words stand {count} times in the file")
    return text.replace(bug.words, bug.instead)


def replay(bug: Bug, alone: float) -> tuple[str, float]:
    """What becomes of the bug, and after how many seconds. `alone` is how long its test takes without it.

    A few examples of a law find most bugs; for what they leave, the law is tried with as many as in the whole suite.
    """
    begun, fate = time.perf_counter(), "SURVIVES"
    if alone == math.inf:
        return "SURVIVES: its test fails without a bug", 0
    try:
        text = planted(bug, tree)
    except (ValueError, OSError) as error:
        return f"SURVIVES: {error}", 0
    with copies.edited(tree / bug.file, text):
        for profile, limit in ("quick", 60 + 5 * alone), ("unshrunk", 60 + 20 * alone):
            status, output = copies.run(tree, ["-x", bug.where, "--hypothesis-profile", profile], limit)
            if status == 1:
                fate = "found"
            elif status is None or status < 0:
                fate = "found: it hangs" if status is None else "found: it ends the process"
            elif status != 0:
                fate = f"SURVIVES: pytest's status is {status}: {output[-1500:]}"
            if status != 0:
                break
    return fate, time.perf_counter() - begun


def unplanted(tests: Sequence[str]) -> dict[str, float]:
    """How many seconds each test takes without a bug, infinitely many if it fails."""
    status, output = copies.run(tree, [*tests, "--hypothesis-profile", "quick"], 7200)
    if status not in (0, 1):
        raise SystemExit(f"the tests do not run (pytest's status {status}):\n{output[-3000:]}")
    times = [line.split() for line in output.splitlines()[-len(tests):]]
    return {test: float(seconds) for seconds, test in times}


def chosen(bugs: Sequence[Bug], words: Sequence[str], changed: bool) -> Iterator[Bug]:
    """Those of a room, "." for the tests outside of all, or with one of the words in them; with `changed`, those whose
    file or test differs from the last commit."""
    files = subprocess.run(["git", "diff", "--name-only", "HEAD"], cwd=ROOT, capture_output=True,
                           text=True).stdout.split() if changed else []
    rooms = {bug.room for bug in bugs}
    for bug in bugs:
        said = f"{bug.file} {bug.where} {bug.why}"
        meant = not words or any(word == bug.room if word in rooms else word in said for word in words)
        if meant and (not changed or bug.file in files or bug.where.split("::")[0] in files):
            yield bug


def survivors(bugs: Sequence[Bug], workers: int = 1) -> list[Bug]:
    """The bugs that no test finds. What becomes of each is printed as soon as it is known."""
    left = []
    with copies.pool(workers, begin) as pool:
        alone = pool.submit(unplanted, sorted({bug.where for bug in bugs})).result()
        passed = [seconds for seconds in alone.values() if seconds < math.inf]
        print(f"{len(passed)} of {len(alone)} tests pass without a bug, in {sum(passed):.0f} s", flush=True)
        fates = pool.map(replay, bugs, [alone[bug.where] for bug in bugs])
        for bug, (fate, seconds) in zip(bugs, fates, strict=True):
            print(f"{seconds:5.1f} s  {fate}  {bug.file}: {bug.why} ({bug.where})", flush=True)
            if fate.startswith("SURVIVES"):
                left.append(bug)
    return left


def score(path: str, within: Sequence[str], every: int, workers: int) -> int:
    """Try every K-th mutant of a file, folder or function on the tests of its room. Print the share that is found."""
    files = sorted((ROOT / path).rglob("*.py")) if (ROOT / path).is_dir() else [ROOT / path]
    some = [mutant for file in files for mutant in mutants.mutants(ROOT, file.relative_to(ROOT).as_posix())
            if not within or mutant.where.split(".")[0] in within][::every]
    same = mutants.equivalent(ROOT)
    some = left = [mutant for mutant in some if mutant[:4] not in same]
    with copies.pool(workers, begin) as pool:
        rooms = {Path(mutant.file).parts[1]: mutant for mutant in some}
        for room, mutant in rooms.items():
            if pool.submit(tried, mutant._replace(text=(ROOT / mutant.file).read_text()), False).result():
                raise SystemExit(f"the tests of {room} fail without a mutant")
        for slow in False, True:  # what the fast tests leave, all tests get
            before, left = left, []
            for mutant, is_found in zip(before, pool.map(tried, before, itertools.repeat(slow)), strict=True):
                if not is_found:
                    left.append(mutant)
                    print(f"{'SURVIVES' if slow else 'the fast tests leave'} {mutant}", flush=True)
    share = 1 - len(left) / max(1, len(some))
    print(f"{len(some) - len(left)} of {len(some)} mutants are found: {100 * share:.1f} %")
    return 1 if left else 0


def tried(mutant: mutants.Mutant, slow: bool) -> bool:
    """Whether a fast test of the mutant's room finds it; with `slow`, whether any test does, with all its examples.

    The tests that found the last mutants run first.
    """
    room = Path("tests", Path(mutant.file).parts[1]).as_posix()
    which, limit = (["--hypothesis-profile", "unshrunk"], 1200) if slow else (["-m", "not slow"], 120)
    with copies.edited(tree / mutant.file, mutant.text):
        status, output = copies.run(tree, ["-x", room, *which], limit, finders)
    failed = [line.split()[1] for line in output.splitlines() if line.startswith("inf ")]
    finders[:] = dict.fromkeys([*failed, *finders])
    return status != 0


def begin(folder: str) -> None:
    """Give a worker a tree of its own."""
    global tree
    tree = copies.copy(ROOT, folder)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="rooms, or words of a record")
    parser.add_argument("-j", type=int, default=1, metavar="N", help="copies that are worked in at once")
    parser.add_argument("--changed", action="store_true", help="files that differ from the last commit alone")
    parser.add_argument("--mutate", metavar="PATH", help="a file or folder to mutate, rather than records")
    parser.add_argument("--within", nargs="+", default=(), metavar="NAME", help="of these functions and classes alone")
    parser.add_argument("--every", type=int, default=1, metavar="K", help="every K-th mutant alone")
    options = parser.parse_args(arguments)
    if options.mutate:
        return score(options.mutate, options.within, options.every, options.j)
    bugs = list(chosen(records(), options.words, options.changed))
    left = survivors(bugs, options.j) if bugs else []
    print(f"{len(bugs) - len(left)} of {len(bugs)} planted bugs are found")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
