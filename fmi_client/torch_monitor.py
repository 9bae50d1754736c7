"""A barrier that says who is late, and after which the group can still be used."""

from __future__ import annotations

import asyncio

from fmi_client.communicator import Communicator
from fmi_client.errors import CollectiveTimeout, PunchFailed

ANSWER_SECONDS = 1.0
"""How much longer than rank 0 waits for the others its word may take."""

NOT_THERE = CollectiveTimeout, PunchFailed
"""A rank that is late may not have been linked yet."""


async def monitor(comm: Communicator, number: int, limit: float, wait_all_ranks: bool) -> None:
    """Let rank 0 hear from all others, and say who was late to those who were not.

    Args:
        comm: used for this only.
        number: counts these barriers, alike on all ranks.
        limit: seconds for the others to come.
        wait_all_ranks: name all who are late, not only the first.

    Raises:
        CollectiveTimeout: on all who came; ``missing`` are who did not, ranks of the job.
        FmiError: the job is over.
    """
    if comm.rank:
        await comm.send(None, 0, number, timeout=limit)
        late = await comm.recv(0, number, timeout=limit + ANSWER_SECONDS)
    else:
        late = await _late(comm, number, limit, wait_all_ranks)
        # Who was late may be dead, or without a link: then it hears nothing, and nobody waits.
        patience = ANSWER_SECONDS if late else None
        peers = range(1, comm.size)
        answers = [comm.send(late, peer, number, timeout=patience) for peer in peers]
        await asyncio.gather(*answers, return_exceptions=bool(late))
    if late:
        rank = comm.world_rank
        why = _blame(late, limit, rank, comm.group[0])
        raise CollectiveTimeout(why, missing=late, rank=rank, op="monitored_barrier")


def _blame(late: list[int], limit: float, rank: int, first: int) -> str:
    """Say who was late in the words of gloo's errors, which programs look for."""
    names = f"Rank{'s' * (len(late) > 1)} {', '.join(map(str, late))}"
    why = f"{names} failed to pass monitoredBarrier in {limit * 1000:.0f} ms"
    if rank == first:
        return f"Rank {rank} timed out in monitoredBarrier: {why}"
    return (
        f"Rank {rank} successfully reached monitoredBarrier, "
        f"but received errors while waiting for send/recv from rank {first}: {why}"
    )


async def _late(comm: Communicator, number: int, limit: float, wait_all_ranks: bool) -> list[int]:
    """Return who did not come; one by one, the last ones would have no time left for a link."""
    peers = range(1, comm.size)
    waits = [comm.recv(peer, number, timeout=limit) for peer in peers]
    errors = await asyncio.gather(*waits, return_exceptions=True)
    for error in errors:
        if isinstance(error, BaseException) and not isinstance(error, NOT_THERE):
            raise error
    late = [comm.group[p] for p, e in zip(peers, errors, strict=True) if isinstance(e, NOT_THERE)]
    return late if wait_all_ranks else late[:1]
