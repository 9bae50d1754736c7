"""Links inside one process, for tests and for a rank that sends to itself."""

from __future__ import annotations

from fmi_client.protocol.inbox import Inbox
from fmi_client.protocol.peer import Key, Payload, head
from fmi_client.protocol.transfers import Send
from fmi_client.transport.link import Link

STAGE_BYTES = 512
"""A thousand ranks in one process have many inboxes, and nothing to gain from large ones."""


class MemoryLink(Link):
    """One end; what it sends is in the partner's inbox when `send` returns."""

    def __init__(self, peer: int, inbox: Inbox) -> None:
        super().__init__(peer, inbox, "memory")
        self.partner: MemoryLink | None = None

    def send(self, key: Key, signature: bytes, payload: Payload) -> Send:
        nbytes = payload.nbytes
        self.bytes_sent += nbytes
        sent = Send()
        if self.error is not None or self.partner is None:
            sent.finish(self.error)
            return sent
        inbox = self.partner.inbox
        inbox.feed(head(key, signature, payload, nbytes))
        for part in payload.parts:
            inbox.feed(part)
        sent.finish()
        return sent

    def close(self) -> None:
        if self.partner is not None and self.partner is not self:
            self.partner.partner = None
        self.partner = None
