"""Where a link goes on when its relay is lost, by what the peer has got."""

from __future__ import annotations

import pytest

from fmi_client.protocol.outbox import TAIL_BYTES, Outbox


def relayed() -> Outbox:
    """10 bytes that the system took whole, 4 of 6 more, and 3 that wait."""
    box = Outbox()
    box.begin(relayed=True, heard=False)
    for data in (b"0123456789", b"abcdef", b"xyz"):
        box.add(memoryview(data))
    box.took(14)
    return box


def waiting(box: Outbox) -> bytes:
    return b"".join(box.next_views())


@pytest.mark.parametrize(
    ("got", "promised", "left"),
    [
        (14, 0, b"efxyz"),  # all that the system took
        (12, 0, b"cdefxyz"),  # part of the first in the queue
        (10, 0, b"abcdefxyz"),
        (7, 0, b"789abcdefxyz"),  # that, and the end of what was done
        (0, 0, b"0123456789abcdefxyz"),
        (17, 5, b"yz"),  # what was encrypted and left counts, too
    ],
)
def test_it_goes_back_to_where_the_peer_is(got: int, promised: int, left: bytes) -> None:
    box = relayed()
    assert box.resume(got, promised)
    assert waiting(box) == left
    box.begin(relayed=True, heard=False)
    box.took(1)
    assert box.resume(got, 0)  # the next relay died, too, and nothing came
    assert waiting(box) == left


def test_a_peer_cannot_have_more_than_was_sent() -> None:
    assert not relayed().resume(15, 0)
    assert not relayed().resume(17, 2)


def test_what_is_not_known_any_more_is_not_made_up() -> None:
    box = relayed()
    done = box.add(memoryview(b"head"), memoryview(b"the caller's"))
    box.took(len(waiting(box)))
    assert done.done
    assert box.resume(35, 0)
    assert not box.resume(34, 0)
    box.add(memoryview(bytes(TAIL_BYTES)))
    box.took(TAIL_BYTES)
    assert not box.resume(34, 0)


def test_a_message_that_goes_again_from_its_start_can_be_taken_back() -> None:
    box = relayed()
    begun, last = box.queue
    assert not box.withdraw(begun, 0)
    assert box.resume(10, 0)
    assert box.withdraw(begun, 0)
    assert not box.withdraw(last, 1)  # encrypted behind it
    assert waiting(box) == b"xyz"
