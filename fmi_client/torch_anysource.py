"""A receive from whichever rank sends first, which only `torch.distributed` asks for."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

from fmi_client.communicator import Communicator
from fmi_client.errors import CollectiveTimeout
from fmi_client.payloads import unpack
from fmi_client.protocol.peer import POINT_TO_POINT
from fmi_client.protocol.transfers import Receive
from fmi_client.transport.link import Link

OP = "recv from any source"


async def recv_any(comm: Communicator, tag: int) -> tuple[int, Any]:
    """Receive from whichever other rank's message of `tag` comes first.

    Makes the links with all ranks of the communicator.

    Returns:
        The sender's rank, and what it sent.

    Raises:
        CollectiveTimeout: nobody sent anything within the communicator's timeout.
        FmiError: the job is over.
    """
    first = _First(comm, tag)
    try:
        source, receive = await asyncio.wait_for(first.found, comm.seconds(None))
    except TimeoutError:
        why = f"no rank sent anything within {comm.timeout:.3g} s"
        raise CollectiveTimeout(why, rank=comm.world_rank, op=OP) from None
    finally:
        first.cancel()
    comm.raise_ended(OP)
    if receive.error is not None:
        raise receive.error
    return source, unpack(receive.meta, receive.data)


class _First:
    """Receives posted on the links with all other ranks, of which the first to end stays."""

    def __init__(self, comm: Communicator, tag: int) -> None:
        self.found: asyncio.Future[tuple[int, Receive]]
        self.found = asyncio.get_running_loop().create_future()
        self._posted: dict[int, tuple[Link, Receive]] = {}
        self._left = comm.size - 1  # how many may still send
        key = (POINT_TO_POINT, comm.context, tag)
        for source in range(comm.size):
            if source != comm.rank and not self.found.done():
                self._post(source, comm.link(source), Receive(key, b"", None))

    def _post(self, source: int, link: Link, receive: Receive) -> None:
        receive.on_done = partial(self._hear, source)
        self._posted[source] = link, receive
        link.post(receive)

    def _hear(self, source: int) -> None:
        _, receive = self._posted.pop(source)
        self._left -= receive.error is not None
        if receive.error is not None and self._left:
            return  # that rank has left; another one may still send, or be asked next
        self.cancel()  # at once: a second message must stay for who receives next
        if not self.found.done():
            self.found.set_result((source, receive))

    def cancel(self) -> None:
        for link, receive in self._posted.values():
            link.cancel(receive)
        self._posted.clear()
