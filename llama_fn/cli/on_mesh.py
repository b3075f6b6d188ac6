"""`--mesh` and `--plan`: the processes of `torchrun` run a command together, and one of them speaks."""

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Annotated

import torch
import tyro

from llama_fn.cli.errors import description, is_for_the_user
from llama_fn.mesh.connect import launched, leave
from llama_fn.mesh.lost import RankError
from llama_fn.mesh.plan import PRESETS, check_mesh, default_plan, parse_mesh, plan_of
from llama_fn.mesh.world import ALONE, World, join

Mesh = Annotated[str | None, tyro.conf.arg(metavar="AXIS=SIZE,...")]
MeshPlan = Annotated[str | None, tyro.conf.arg(name="plan", metavar="{" + "|".join(PRESETS) + "}")]
LATER = 30.0  # seconds for the first process to say what is wrong for all of them; `torchrun` then ends the others


@contextlib.contextmanager
def on_mesh(mesh: str | None, plan: str | None, device: torch.device) -> Iterator[World]:
    """A context manager that joins the processes of `torchrun`, and yields this one's `World`; without a mesh, `ALONE`.

    Of all processes but the first, what is printed goes nowhere. Raises `ValueError` for a mesh or a plan that is not
    known, and for a mesh of another size than the number of processes.
    """
    _, count = launched()
    if mesh is None:
        if plan is not None:
            raise ValueError(f"--plan {plan} divides a model over a mesh: give --mesh, such as dp=2")
        if count > 1:
            raise ValueError(f"torchrun started {count} processes: say by --mesh how they share the work, such as "
                             f"dp={count}")
        yield ALONE
        return
    sizes = parse_mesh(mesh)
    chosen = default_plan(sizes) if plan is None else plan
    plan_of(chosen)
    check_mesh(sizes, count)
    if device.index is not None:
        raise ValueError(f"--device {device} is one device, and every process has one of its own; choose {device.type}")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    world = join(sizes, chosen, device.type)
    try:
        with world.watched(), contextlib.ExitStack() as quiet:
            if not world.is_first:
                nowhere = quiet.enter_context(open(os.devnull, "w"))
                quiet.enter_context(contextlib.redirect_stdout(nowhere))
                quiet.enter_context(contextlib.redirect_stderr(nowhere))
            yield world
    except Exception as error:
        if world.is_first or isinstance(error, RankError) or not is_for_the_user(error):
            raise
        raise RankError(f"rank {world.ranks.rank}: {description(error)}") from error
    finally:
        leave()


def speaker(error: Exception) -> str:
    """The words before an error that this process prints: of all processes but the first, which one it is.

    An error before the processes joined is one of all, and the first one says it. Therefore any other one waits before
    it speaks, and `torchrun` ends it meanwhile.
    """
    rank, _ = launched()
    if rank == 0 or isinstance(error, RankError):
        return ""
    time.sleep(LATER)
    return f"rank {rank}: "
