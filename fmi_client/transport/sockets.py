"""How this project opens TCP sockets, and how the system's errors become ours."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket

from fmi_client.protocol.addresses import Address, version
from fmi_client.protocol.rendezvous import KEEPALIVE

RETRY = frozenset(
    {
        errno.ECONNREFUSED,  # nobody listens yet, or the other side's router refused
        errno.ECONNRESET,
        errno.ECONNABORTED,
        errno.EADDRNOTAVAIL,  # this pair of addresses is in use: the peer connected first
        errno.EADDRINUSE,
        errno.EACCES,  # "administratively prohibited", in the words of an IPv6 firewall
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.ETIMEDOUT,
        errno.EPIPE,
    }
)
"""What a punch survives: the next attempt, or another address, may go through."""

IN_PROGRESS = frozenset({errno.EINPROGRESS, errno.EALREADY, errno.EWOULDBLOCK})

TCP_SYN_SENT, IP_MINTTL = 2, 21
"""From linux/tcp_states.h and linux/in.h; Python's socket module does not name them."""

ANYWHERE = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}
"""Addresses that stand for the internet (RFC 5737, RFC 3849); nothing is sent to them."""


def family(address: Address) -> socket.AddressFamily:
    return socket.AF_INET6 if version(address) == 6 else socket.AF_INET


def bound_socket(port: int, family: int = socket.AF_INET) -> socket.socket:
    """Return a non-blocking socket bound to local `port` (0: a free one, nobody else's).

    Server connection, listener and punches share one local port, since a NAT maps the
    port and not the socket. The bind is explicit: a connect that binds by itself can be
    given a port that another socket holds.
    """
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(("", port))
    except OSError:
        sock.close()
        raise
    return sock


def bound_pair(but: int = 0) -> list[socket.socket]:
    """Return a socket for IPv4 and, where the machine has it, one for IPv6, at one free port.

    Args:
        but: not this one. A server that has yet to start on our machine would find its port
            taken, and we would connect to ourselves.
    """
    while True:
        four = bound_socket(0)
        port = four.getsockname()[1]
        if port == but:
            pair = bound_pair(but)
            four.close()
            return pair
        try:
            return [four, bound_socket(port, socket.AF_INET6)]
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                return [four]
            four.close()  # somebody has the port for IPv6 only


def own_addresses(local: Address) -> tuple[Address, ...]:
    """Return `local`, our end of a connection, and what we are called in the other IP version."""
    other = socket.AF_INET if version(local) == 6 else socket.AF_INET6
    if ipaddress.ip_address(local[0]).is_loopback:  # who is on this machine has no need of it
        return (local,)
    try:
        with socket.socket(other, socket.SOCK_DGRAM) as probe:
            probe.connect((ANYWHERE[other], local[1]))
            ip = ipaddress.ip_address(probe.getsockname()[0])
    except OSError:
        return (local,)
    return (local,) if ip.is_loopback or ip.is_link_local else (local, (str(ip), local[1]))


def keep_alive(sock: socket.socket) -> None:
    """Let the kernel find out that the other side is gone, even while we compute."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def connect_short(sock: socket.socket, address: Address, hops: int) -> int:
    """As `connect_ex`, with a first SYN that dies after so many hops.

    It opens the doors of our own NATs and reaches nobody who could slam them. Whatever the
    socket sends later goes all the way: the peer's SYN may come, and wants an answer.
    """
    level, limit = socket.IPPROTO_IP, socket.IP_TTL
    if sock.family == socket.AF_INET6:
        level, limit = socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS
    sock.setsockopt(level, limit, hops)
    # Drops, where the kernel knows the option, what quotes a packet that arrived with less:
    # the "time exceeded" that we provoke would end the attempt (tcp_v4_err; RFC 5082). Its
    # counterpart of IPv6 looks at the hops of the report instead: there, the attempt ends.
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_IP, IP_MINTTL, 2)
    code = sock.connect_ex(address)
    sock.setsockopt(level, limit, -1)
    return code


def answers(sock: socket.socket) -> bool:
    """Whether the peer's SYN has come to a socket that connects."""
    return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != TCP_SYN_SENT


def system_error(code: int) -> OSError:
    """Return the error for what `connect_ex` or SO_ERROR gave."""
    return OSError(code, os.strerror(code))
