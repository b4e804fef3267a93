"""TCP connections between the launchers of one run: one JSON object a line."""

from __future__ import annotations

import json
import socket
from contextlib import suppress
from typing import Any

from harness.errors import UserError
from harness.system.files import json_object

LONGEST_MESSAGE_BYTES = 16 * 2**20
"""A peer that sends more without a line break is no launcher."""
SEND_S = 5.0
"""A peer that accepts no bytes for this long counts as disconnected."""


class Connection:
    """One connection; ``receive`` never blocks. ``node`` and ``host`` are set once the peer sent
    them."""

    def __init__(self, peer: socket.socket) -> None:
        self.node: int | None = None
        self.host = ""
        self.is_open = True
        self._socket = peer
        self._received = b""
        self._messages: list[dict[str, Any]] = []
        # A machine that loses power never closes its connections: TCP keep-alive notices after
        # 10 + 3 x 5 s. Not every platform has these options.
        with suppress(OSError, AttributeError):
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in (
                (socket.TCP_KEEPIDLE, 10),
                (socket.TCP_KEEPINTVL, 5),
                (socket.TCP_KEEPCNT, 3),
            ):
                peer.setsockopt(socket.IPPROTO_TCP, option, value)

    def send(self, message: dict[str, Any]) -> None:
        """Send one message. The connection closes where the peer is gone."""
        try:
            self._socket.settimeout(SEND_S)
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self.is_open = False

    def receive(self) -> list[dict[str, Any]]:
        """Messages that have arrived.

        The connection closes when the peer closes it, or when it sends anything but JSON objects.
        """
        self._read()
        messages, self._messages = self._messages, []
        return messages

    def receive_one(self) -> dict[str, Any] | None:
        """The oldest message that has arrived, or None; later ones stay for ``receive``."""
        self._read()
        return self._messages.pop(0) if self._messages else None

    def close(self) -> None:
        self.is_open = False
        with suppress(OSError):
            self._socket.close()

    def _read(self) -> None:
        while self.is_open:
            try:
                self._socket.setblocking(False)
                new = self._socket.recv(1 << 16)
            except BlockingIOError:
                break
            except OSError:
                new = b""
            self._received += new
            self.is_open = bool(new) and len(self._received) <= LONGEST_MESSAGE_BYTES
        *lines, self._received = self._received.split(b"\n")
        messages = [json_object(line.decode(errors="replace")) for line in lines]
        if None in messages:
            self.is_open = False
        self._messages += [message for message in messages if message is not None]


def host_and_port(rendezvous: str) -> tuple[str, int]:
    """Host and port of ``host:port``; an IPv6 address may stand in brackets."""
    host, _, port = rendezvous.rpartition(":")
    return host.strip("[]"), int(port)


def is_address(rendezvous: str) -> bool:
    """Whether ``rendezvous`` has the form host:port."""
    host, _, port = rendezvous.rpartition(":")
    return bool(host) and port.isdecimal() and 0 < int(port) < 65536


def check_resolves(rendezvous: str) -> None:
    """Raise UserError where the host of ``rendezvous`` has no address."""
    host, port = host_and_port(rendezvous)
    try:
        socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"RENDEZVOUS={rendezvous}: the host {host} has no address here: {reason}\n"
            "name node 0 as this machine can reach it, or by its IP address"
        ) from None


def listen(rendezvous: str) -> socket.socket:
    """A non-blocking server at the port of ``rendezvous``, on every address of this machine.

    Raises:
        OSError: the port is in use.
    """
    _, port = host_and_port(rendezvous)
    server = None
    if socket.has_dualstack_ipv6():
        with suppress(OSError):  # the kernel was booted without IPv6
            server = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    server = server or socket.create_server(("", port))
    server.setblocking(False)
    return server


def connect(rendezvous: str, timeout_s: float = 1.0) -> Connection | None:
    """A connection to the program that listens at ``rendezvous``; None where none listens."""
    try:
        return Connection(socket.create_connection(host_and_port(rendezvous), timeout=timeout_s))
    except OSError:
        return None
