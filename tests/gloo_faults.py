"""Whether gloo still has the two faults for which this package does things in a way of its own. They come by chance.

    python tests/gloo_faults.py

Several all-gathers at once destroy memory: if they do not, a compiled step may use torch's own collectives on a CPU,
too (``mesh/collectives.py``). A process finds the addresses of processes that have ended: if it does not, a start of a
run needs no keys of its own (``mesh/connect.py``).
"""

import time
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ROUNDS = 100_000  # six at once crash after 2,000 to 5,000 rounds, on a machine with two free cores


def join(rank: int, port: int, start: str, wait: float) -> None:
    time.sleep(wait)
    store = dist.PrefixStore(start, dist.TCPStore("localhost", port, is_master=False))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=30))
    dist.barrier()


def gather_at_once(rank: int, port: int) -> None:
    join(rank, port, "gathers", 0)
    gather, wait = torch.ops._c10d_functional.all_gather_into_tensor, torch.ops._c10d_functional.wait_tensor
    for _ in range(ROUNDS):
        begun = [gather(torch.ones(16, 2, 4 + i), 2, "0") for i in range(6)]
        for x in begun:
            wait(x)


def ended(processes: list) -> list[int | None]:
    """The statuses of processes, of which those that are left are killed when one has ended by a signal."""
    for process in processes:
        process.start()
    while any(process.is_alive() for process in processes):
        if any((process.exitcode or 0) < 0 for process in processes):
            for process in processes:
                process.kill()
        time.sleep(0.1)
    return [process.exitcode for process in processes]


def main() -> None:
    context, store = mp.get_context("spawn"), dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)

    def joined(start: str) -> bool:
        """Rank 0 comes late, so that rank 1 looks for its address before there is a new one."""
        return ended([context.Process(target=join, args=(rank, store.port, start, 8.0 * (1 - rank)))
                      for rank in range(2)]) == [0, 0]

    assert joined("start 0") and joined("start 1")
    print("a process finds the addresses of processes that have ended:", "no" if joined("start 0") else "yes")
    statuses = ended([context.Process(target=gather_at_once, args=(rank, store.port)) for rank in range(2)])
    print("several all-gathers at once destroy memory:", f"no, in {ROUNDS} rounds" if statuses == [0, 0] else "yes")


if __name__ == "__main__":
    main()
