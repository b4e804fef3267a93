"""A warm process on each node: it imports PyTorch and Megatron-LM once and forks every rank.

torchrun starts one process per rank, and each would spend the same seconds and memory on the same
imports. Here local rank 0 imports and forks. Each other process is a proxy: it sends its
environment and output streams to the fork that runs its rank, forwards signals, and exits as the
fork exits. So torchrun sees N processes with their true exit statuses. A fork dies with its proxy,
and all die with the warm process: whichever is killed, none is left behind.
"""

import json
import os
import resource
import selectors
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from harness.system.orphans import end_with

NUMBER = struct.Struct("i")
CREDENTIALS = struct.Struct("3i")
FORWARDED = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class Fork:
    """A forked rank, and the connection to its proxy; the warm process's own rank has none."""

    pid: int
    handle: int
    link: socket.socket | None

    def signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.handle, number)


def become_rank(prepare: Callable[[], object]) -> None:
    """Return in the fork that runs this rank, after ``prepare`` was called; never in the others.

    Call it before anything starts a thread: a fork has only the calling thread, and would wait
    forever for a lock that another thread of its parent held.
    """
    if os.environ["LOCAL_RANK"] != "0":
        _be_proxy()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(_address())
        server.listen()
        prepare()
        _fork_ranks(server, ranks=int(os.environ["LOCAL_WORLD_SIZE"]))


def fork() -> int:
    """``os.fork``, but the fork dies with this process and has default signal handlers."""
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        end_with(parent)
        for number in FORWARDED:
            signal.signal(number, signal.SIG_DFL)
    return pid


def _fork_ranks(server: socket.socket, ranks: int) -> None:
    """Fork this process's own rank and one for every proxy that connects; return in the forks.

    When all have ended, or the own rank has failed, this process exits as its own rank did.
    """
    selector = selectors.DefaultSelector()
    selector.register(server, selectors.EVENT_READ)

    def watch(pid: int, link: socket.socket | None = None) -> Fork:
        watched = Fork(pid, os.pidfd_open(pid), link)
        for end in filter(None, (watched.handle, link)):
            selector.register(end, selectors.EVENT_READ, watched)
        return watched

    if not (pid := fork()):
        return
    own = watch(pid)
    for number in FORWARDED:
        signal.signal(number, lambda number, _: own.signal(number))
    status = 0
    while ranks:
        for key, _ in selector.select():
            one: Fork = key.data
            if key.fileobj is server:
                link, environment, outputs = _accept(server)
                if not (pid := fork()):
                    os.environ.clear()
                    os.environ.update(environment)
                    for theirs, ours in zip(outputs, (1, 2), strict=True):
                        os.dup2(theirs, ours)
                    return
                for theirs in outputs:
                    os.close(theirs)
                watch(pid, link)
            elif key.fileobj is one.link:
                numbers = one.link.recv(16)
                for number in numbers or (signal.SIGKILL,):
                    one.signal(number)
                if not numbers:  # the proxy ended
                    selector.unregister(one.link)
            else:
                ended = os.waitstatus_to_exitcode(os.waitpid(one.pid, 0)[1])
                selector.unregister(one.handle)
                ranks -= 1
                if one is own:
                    status = ended
                    if status:
                        _end_as(status)
                else:
                    with suppress(BrokenPipeError):
                        one.link.sendall(NUMBER.pack(ended))
    _end_as(status)


def _be_proxy() -> NoReturn:
    """Have the warm process fork this rank, forward signals to it, and exit as it exits."""
    link = _connect()
    environment = json.dumps(dict(os.environ)).encode()
    socket.send_fds(link, [NUMBER.pack(len(environment))], [1, 2])
    link.sendall(environment)

    def forward(number: int, _: object) -> None:
        with suppress(BrokenPipeError):
            link.send(bytes([number]))

    for number in FORWARDED:
        signal.signal(number, forward)
    ended = link.recv(NUMBER.size, socket.MSG_WAITALL)
    _end_as(NUMBER.unpack(ended)[0] if ended else -signal.SIGTERM)  # all die with the warm process


def _address() -> str:
    """The abstract socket of the processes that one torchrun started on this node."""
    run = (
        os.environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    )
    return "\0harness/" + "/".join([str(os.getppid()), *run])


def _connect() -> socket.socket:
    """Connect to the warm process, which may still be starting."""
    while True:
        link = socket.socket(socket.AF_UNIX)
        try:
            link.connect(_address())
            _check_owner(link)
            return link
        except ConnectionRefusedError:
            link.close()
            time.sleep(0.02)


def _accept(server: socket.socket) -> tuple[socket.socket, dict[str, str], list[int]]:
    """The connection to a new proxy, its environment, and its standard output and error."""
    link, _ = server.accept()
    _check_owner(link)
    size, outputs, _, _ = socket.recv_fds(link, NUMBER.size, 2)
    environment = link.recv(NUMBER.unpack(size)[0], socket.MSG_WAITALL)
    return link, json.loads(environment), outputs


def _check_owner(link: socket.socket) -> None:
    """Refuse a peer of another user.

    Abstract sockets have no permissions, and an environment may hold secrets.
    """
    peer = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    if CREDENTIALS.unpack(peer)[1] != os.getuid():
        raise PermissionError(
            f"process {CREDENTIALS.unpack(peer)[0]} of another user uses this run's socket"
        )


def _end_as(status: int) -> NoReturn:
    """Exit with ``status``, or by signal ``-status``, so that torchrun reports the true cause."""
    if status >= 0:
        os._exit(status)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the fork has dumped its core already
    if -status not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
    os._exit(128 - status)
