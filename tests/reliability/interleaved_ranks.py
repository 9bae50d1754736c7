"""Ranks without sockets, and what connects them; see `tests.reliability.interleavings`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from fmi_client.errors import AuthenticationFailed, FmiError, ProtocolError
from fmi_client.protocol import auth
from fmi_client.protocol.hello import Hello
from fmi_client.protocol.inbox import Inbox
from fmi_client.protocol.notice import Notice
from fmi_client.protocol.peer import (
    COLLECTIVE,
    HELLO_BYTES,
    POINT_TO_POINT,
    Handshake,
    Key,
    Payload,
    head,
    read_hello,
)
from fmi_client.protocol.relay import RELAY_GO, relay_request
from fmi_client.protocol.rendezvous import ClientSide, Event, Gone, PunchNow, Ready, Want, Welcome
from fmi_client.protocol.transfers import Receive

if TYPE_CHECKING:
    from tests.reliability.interleavings import World

NAT = "203.0.113.1", 4000
"""Where all ranks seem to be."""
SIGNATURE = b"what all ranks of all jobs call"
KEYS: list[Key] = [
    (kind, context, n)
    for kind in (COLLECTIVE, POINT_TO_POINT)
    for context in (0, 1)
    for n in (0, 1)
]


class Group(NamedTuple):
    """Whose ranks belong together, and nobody else."""

    job: str
    epoch: int
    run: bytes


class End:
    """One end of a connection: what is on its way to it, and who takes that.

    Args:
        coming: all ends that something is on its way to; this one is put in when that is so.
    """

    def __init__(self, coming: list[End]) -> None:
        self.other = self
        self.data = bytearray()
        self.closed = self.ended = False
        self.take: Callable[[bytes], None] = lambda _: None
        self.lost: Callable[[], None] = lambda: None
        self._coming = coming
        self._listed = False

    def send(self, data: bytes | bytearray) -> None:
        if data and not self.closed:
            self.other.data += data
            self.other._list()

    def close(self) -> None:
        """The other end gets what was sent, and then the end."""
        if not self.closed:
            self._unlist()
            self.closed = self.other.ended = True
            self.other._list()

    def move(self, coming: list[End]) -> None:
        """Be put into another list from now on."""
        listed = self._listed
        self._unlist()
        self._coming = coming
        if listed:
            self._list()

    def _list(self) -> None:
        if not self._listed and not self.closed:
            self._listed = True
            self._coming.append(self)

    def _unlist(self) -> None:
        if self._listed:
            self._listed = False
            self._coming.remove(self)

    def deliver(self, count: int) -> None:
        """Let so many bytes come, or the end behind the last."""
        piece = bytes(self.data[:count])
        del self.data[:count]
        if not self.data and not self.ended:
            self._unlist()
        if piece:
            self.take(piece)
        else:
            self.close()
            self.lost()


class Trial:
    """A connection on which a rank hopes to find its peer."""

    def __init__(self, attempt: Attempt, end: End) -> None:
        self.attempt, self.end = attempt, end
        rank, told = attempt.rank, attempt.told
        self.handshake = Handshake(
            rank.number, told.peer, rank.epoch, rank.key, told.cookie, rank.job
        )
        attempt.trials.append(self)
        end.take, end.lost = self.take, self.drop
        self.flush()

    def flush(self) -> None:
        self.end.send(self.handshake.outgoing)
        self.handshake.outgoing.clear()

    def take(self, data: bytes) -> None:
        try:
            self.handshake.receive(data)
        except (AuthenticationFailed, ProtocolError):
            self.attempt.rank.world.seen["strangers"] += 1
            self.drop()
            return
        self.flush()
        if self.handshake.complete:
            self.attempt.rank.linked(self)
        elif self.handshake.low and self.handshake.proven and self.attempt.picked is None:
            self.attempt.picked = self
            self.handshake.pick()
            self.flush()

    def drop(self) -> None:
        self.end.close()
        if self.attempt.picked is self:
            self.attempt.picked = None


class Attempt:
    """What a rank does about a "punch": call, be called, ask the relay."""

    def __init__(self, rank: Rank, told: PunchNow) -> None:
        self.rank, self.told = rank, told
        self.trials: list[Trial] = []
        self.picked: Trial | None = None
        self.ticket = told.ticket

    def call(self) -> None:
        """Connect to where the peer should be; by now another rank may be there."""
        world, rank, draw = self.rank.world, self.rank, self.rank.world.random
        found = [each for each in world.ranks if not each.over]
        named = [each for each in found if each.number == self.told.peer] or found
        right = [each for each in named if each.whole == rank.whole] or named
        callee = draw.choice(draw.choice([found, named, right, right]))
        ours, theirs = world.connection()
        if callee.attempts and draw.random() < 0.2:  # which connects to us at the same moment
            Trial(draw.choice([*callee.attempts.values()]), theirs)
        else:
            callee.accept(theirs)
        Trial(self, ours)

    def dial(self) -> None:
        ticket, self.ticket = self.ticket, None
        if ticket is None:
            return
        ours, theirs = self.rank.world.connection()
        self.rank.world.serve(theirs, self.rank)
        ours.send(relay_request(ticket))
        self.rank.ends.append(ours)

        def met(data: bytes) -> None:
            assert data[:1] == RELAY_GO
            if self.rank.attempts.get(self.told.peer) is not self:
                ours.close()
                return
            trial = Trial(self, ours)
            if data[1:]:
                trial.take(data[1:])

        ours.take, ours.lost = met, ours.close

    def stop(self, but: Trial | None = None) -> None:
        for trial in self.trials:
            if trial is not but:
                trial.end.close()


class Link:
    """What two ranks send each other when they have a connection; each payload says whose it is."""

    def __init__(self, rank: Rank, peer: int, end: End) -> None:
        self.rank, self.peer, self.end = rank, peer, end
        self.inbox = Inbox(lambda nbytes: memoryview(bytearray(nbytes)))
        self.expected = rank.world.random.sample(KEYS, len(KEYS))
        end.take, end.lost = self.inbox.feed, self.lost
        for key in rank.world.random.sample(KEYS, len(KEYS)):
            data = self.tag(rank.number, peer, key)
            end.send(head(key, SIGNATURE, Payload(b"", (data,)), len(data)) + data)

    def tag(self, sender: int, receiver: int, key: Key) -> bytes:
        return repr((self.rank.whole, sender, receiver, key)).encode()

    def post(self) -> None:
        if not self.expected:
            return
        key = self.expected.pop()
        receive = Receive(key, SIGNATURE, None)
        receive.on_done = lambda: self.check(receive, key)
        self.inbox.post(receive)

    def check(self, receive: Receive, key: Key) -> None:
        expected = self.tag(self.peer, self.rank.number, key)
        assert receive.error is None
        assert bytes(receive.data) == expected, "a frame went astray"
        self.rank.world.seen["payloads"] += 1

    def lost(self) -> None:
        if self.rank.links.get(self.peer) is self:
            del self.rank.links[self.peer]


class Rank:
    """One process, with a number in an epoch of a job."""

    def __init__(self, world: World, job: str, epoch: int, number: int, size: int) -> None:
        self.world, self.job, self.epoch = world, job, epoch
        self.number, self.size, self.key = number, size, world.key
        self.inner = f"10.0.0.{len(world.ranks) + 1}", 4000
        self.identity = bytes([len(world.ranks) + 1]) * 16
        self.run, self.began, self.over = b"", False, False
        self.side: ClientSide | None = None
        self.line = End([])
        self.attempts: dict[int, Attempt] = {}
        self.links: dict[int, Link] = {}
        self.early: dict[End, bytes] = {}
        """Callers that are here before the server's word, and what they said."""
        self.ends: list[End] = []
        self.asked: Counter[int] = Counter()

    @property
    def group(self) -> Group:
        return Group(self.job, self.epoch, self.run)

    @property
    def whole(self) -> Group:
        """With the name of the run, unless all runs have one cookie: only that keeps them apart."""
        return self.group._replace(run=b"") if self.world.one_cookie else self.group

    # ------------------------------------------------------------- with the server
    def join(self) -> None:
        self.line, theirs = self.world.connection()
        self.world.serve(theirs, self)
        again = self.run, self.began and bool(self.run)
        hello = Hello(
            self.job,
            self.size,
            self.number,
            self.epoch,
            0,
            (self.inner,),
            auth.nonce(),
            self.identity,
            *again,
        )
        self.side, self.asked = ClientSide(hello, None), Counter()
        self.line.take, self.line.lost = self.hear, self.lose_line
        self.flush()

    def flush(self) -> None:
        if self.side is not None:
            self.line.send(self.side.outgoing)
            self.side.outgoing.clear()

    def lose_line(self) -> None:
        self.line.close()
        self.side = None

    def hear(self, data: bytes) -> None:
        assert self.side is not None
        try:
            events = self.side.receive(data)
            self.flush()
            for event in events:
                if not self.over:
                    self.told(event)
            if self.side is not None and self.side.failure is not None:
                raise self.side.failure
        except FmiError:
            self.die()

    def told(self, event: Event) -> None:
        """Hear what the server says, and compare it with what is true."""
        world, group, me = self.world, self.group, self.number
        world.seen[type(event).__name__] += 1
        match event:
            case Welcome(_, run):
                assert run == self.run or not self.began, "taken into another run"
                self.run = run
            case Ready():
                assert world.came[group] == set(range(self.size)), "ready without all"
                self.began = True
                if world.random.random() < 0.3:
                    self.line.move(world.late)
            case Gone(rank):
                assert (group, rank) in world.went, "somebody else has gone"
            case Want(peer):
                assert (group, peer, me) in world.asked, "somebody else wants a link"
                self.ask(peer)
            case PunchNow(peer):
                pairs = {(group, peer, me), (group, me, peer)}
                assert pairs <= world.asked, "a punch that these two did not ask for"
                assert {*event.addresses} <= {NAT} | world.inner[group, peer], "another's address"
                self.punch(event)
            case Notice(by):
                self.check_abort(event, by)
                self.die()
            case _:
                pass

    def check_abort(self, event: Notice, by: int) -> None:
        if by >= 0:
            assert event.reason == repr(self.group), "another job was ended"
        else:
            newer = {group for group in self.world.came if group.job == self.job}
            assert max(group.epoch for group in newer) > self.epoch, "nothing newer came"

    def ask(self, peer: int) -> None:
        if self.side is None or not self.began or peer in self.links or self.asked[peer] > 3:
            return
        self.asked[peer] += 1
        self.world.asked.add((self.group, self.number, peer))
        self.side.link(peer)
        self.flush()

    # ------------------------------------------------------------- with other ranks
    def punch(self, told: PunchNow) -> None:
        if told.peer in self.links:
            return
        if told.peer in self.attempts:
            self.attempts[told.peer].stop()
        attempt = self.attempts[told.peer] = Attempt(self, told)
        for end, hello in list(self.early.items()):
            if read_hello(hello).sender == told.peer:
                del self.early[end]
                self.world.seen["early callers"] += 1
                Trial(attempt, end).take(hello)

    def accept(self, end: End) -> None:
        said = bytearray()

        def read(data: bytes) -> None:
            said.extend(data)
            if len(said) >= HELLO_BYTES:
                self.introduce(end, bytes(said))

        self.ends.append(end)
        end.take, end.lost = read, end.close

    def introduce(self, end: End, said: bytes) -> None:
        caller = read_hello(said[:HELLO_BYTES])
        if caller.receiver != self.number or caller.sender == self.number:
            end.close()
        elif caller.sender in self.attempts:
            Trial(self.attempts[caller.sender], end).take(said)
        else:
            self.early[end] = said[:HELLO_BYTES]
            end.lost = lambda: (self.early.pop(end, None), end.close())[1]

    def linked(self, trial: Trial) -> None:
        peer = trial.attempt.told.peer
        trial.attempt.stop(but=trial)
        del self.attempts[peer]
        link = self.links[peer] = Link(self, peer, trial.end)
        for _ in range(self.world.random.randrange(len(KEYS) + 1)):
            link.post()
        rest = trial.handshake.rest()
        if rest:
            link.inbox.feed(rest)

    # ------------------------------------------------------------- until the end
    def die(self) -> None:
        self.over, self.side = True, None
        for attempt in self.attempts.values():
            attempt.stop()
        for end in [self.line, *self.ends, *(link.end for link in self.links.values())]:
            end.close()
        self.links.clear()

    def leave(self) -> None:
        if self.side is not None:
            self.side.leave()
            self.flush()
        self.die()

    def abort(self) -> None:
        if self.side is not None and self.began:
            self.side.tell(Notice(self.number, "abort", repr(self.group)))
            self.flush()

    def who(self) -> None:
        if self.side is not None and self.run:
            self.side.who()
            self.flush()

    def act(self) -> None:
        """Do something that a rank may do just now."""
        draw = self.world.random
        if self.side is None:
            self.join()
            return
        unusual = [self.leave, self.die, self.lose_line, self.abort, self.who]
        if draw.random() < 0.03:
            draw.choice(unusual)()
            return
        usual: list[Callable[[], Any]] = [link.post for link in self.links.values()]
        for attempt in self.attempts.values():
            usual += [attempt.call] * 2 + [attempt.dial] * (attempt.ticket is not None)
        others = [n for n in range(self.size) if n != self.number]
        usual += [lambda peer=peer: self.ask(peer) for peer in others]  # type: ignore[misc]
        draw.choice(usual)()
