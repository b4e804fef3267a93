"""Connections between the launchers of one run: lines of JSON over the port where its nodes
meet."""

from __future__ import annotations

import json
import re
import socket
from contextlib import suppress
from typing import Any

from harness.errors import UserError
from harness.system.files import json_object

LONGEST_MESSAGE = 16 * 2**20
"""What sends more without an end of line is no launcher."""
SEND_S = 5.0
"""A peer that takes nothing for this long counts as gone."""
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class Link:
    """One connection; ``receive`` never blocks. ``node`` and ``host`` are known once the peer has
    said them."""

    def __init__(self, peer: socket.socket) -> None:
        self.node: int | None = None
        self.host = ""
        self.is_open = True
        self._socket = peer
        self._received = b""
        self._messages: list[dict[str, Any]] = []
        # a machine that lost its power sends no end: ask it, where that can be set
        with suppress(OSError, AttributeError):
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in (
                (socket.TCP_KEEPIDLE, 10),
                (socket.TCP_KEEPINTVL, 5),
                (socket.TCP_KEEPCNT, 3),
            ):
                peer.setsockopt(socket.IPPROTO_TCP, option, value)

    def send(self, message: dict[str, Any]) -> None:
        """Send one message; the link closes where the peer is gone."""
        try:
            self._socket.settimeout(SEND_S)
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self.is_open = False

    def receive(self) -> list[dict[str, Any]]:
        """The messages that have come; the link closes at the end of the connection, or where they
        are none of ours."""
        self._read()
        messages, self._messages = self._messages, []
        return messages

    def receive_one(self) -> dict[str, Any] | None:
        """The first message that has come, or None; the others stay."""
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
            self.is_open = bool(new) and len(self._received) <= LONGEST_MESSAGE
        *lines, self._received = self._received.split(b"\n")
        messages = [json_object(line.decode(errors="replace")) for line in lines]
        if None in messages:
            self.is_open = False
        self._messages += [message for message in messages if message is not None]


def parts(rendezvous: str) -> tuple[str, int]:
    """Host and port of ``host:port``; an IPv6 address may stand in brackets."""
    host, _, port = rendezvous.rpartition(":")
    return host.strip("[]"), int(port)


def resolve(rendezvous: str) -> None:
    """Raise UserError where the host of ``rendezvous`` has no address."""
    host, port = parts(rendezvous)
    try:
        socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"RENDEZVOUS={rendezvous}: the host {host} has no address here: {reason}\n"
            "name node 0 as this machine can reach it, or by its IP address"
        ) from None


def listen(rendezvous: str) -> socket.socket:
    """A listening socket at the port of ``rendezvous``, on every address here. Raises OSError where
    it is taken."""
    _, port = parts(rendezvous)
    if socket.has_dualstack_ipv6():
        with suppress(OSError):
            return _listening(
                socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
            )
    return _listening(socket.create_server(("", port)))


def _listening(server: socket.socket) -> socket.socket:
    server.setblocking(False)
    return server


def connect(rendezvous: str, timeout_s: float = 1.0) -> Link | None:
    """A connection to what listens at ``rendezvous``; None where nothing does."""
    try:
        return Link(socket.create_connection(parts(rendezvous), timeout=timeout_s))
    except OSError:
        return None


def printable(text: object) -> str:
    """``text`` of another machine, without what would steer a terminal."""
    return _CONTROLS.sub("?", str(text))
