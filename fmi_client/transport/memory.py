"""Links inside one process, for tests and for a rank that sends to itself."""

from __future__ import annotations

from fmi_client.protocol.inbox import Inbox
from fmi_client.protocol.peer import Key, Payload, head
from fmi_client.protocol.transfers import Receive, Send

STAGE_BYTES = 512
"""A thousand ranks in one process have many inboxes, and nothing to gain from large ones."""


class MemoryLink:
    """One end; what it sends is in the partner's inbox when `send` returns."""

    def __init__(self, peer: int, inbox: Inbox) -> None:
        self.peer = peer
        self.kind = "memory"
        self.tls = False
        self.error: Exception | None = None
        self.inbox = inbox
        self.bytes_sent = 0
        self.partner: MemoryLink | None = None

    @property
    def busy(self) -> bool:
        return self.inbox.waiting > 0

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

    def post(self, receive: Receive) -> None:
        self.inbox.post(receive)
        if not receive.done and self.error is not None:
            self.inbox.cancel(receive)
            receive.finish(self.error)

    def cancel(self, receive: Receive) -> None:
        self.inbox.cancel(receive)

    def read(self) -> None:
        pass

    def withdraw(self, sent: Send) -> bool:
        return True

    def make_room(self, room: bool) -> None:
        pass

    def close(self) -> None:
        if self.partner is not None and self.partner is not self:
            self.partner.partner = None
        self.partner = None

    def abort(self, error: Exception) -> None:
        self.error = self.error or error
        self.inbox.fail(error)
