"""What `connect` chooses from: the rendezvous server, or a store."""

from __future__ import annotations

from fmi_client.endpoint import Allocate
from fmi_client.hosts import resolve
from fmi_client.join_request import JoinRequest
from fmi_client.joining import Joining
from fmi_client.protocol.addresses import Address
from fmi_client.socket_endpoint import SocketEndpoint
from fmi_client.store_endpoint import StoreEndpoint
from fmi_client.transport import store as stores
from fmi_client.transport.reactor import Reactor
from fmi_client.transport.store import Store


def find(request: JoinRequest) -> tuple[Address, ...] | Store:
    """Look up the server, or open the store; blocking.

    Raises:
        RendezvousError: there is no such host, or what the store needs is not installed.
    """
    if request.channel == "object":
        return stores.open_store(request.store)
    return resolve(*request.server)


def endpoint(
    reactor: Reactor, place: tuple[Address, ...] | Store, request: JoinRequest, allocate: Allocate
) -> Joining:
    """Return the endpoint of a rank that joins at `place`, which `find` found."""
    if isinstance(place, tuple):
        return SocketEndpoint(reactor, place, request, allocate)
    return StoreEndpoint(reactor, place, request, allocate)
