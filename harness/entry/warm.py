"""One warm process a node: it imports PyTorch and Megatron-LM once and forks every rank of the
node.

torchrun starts one process a rank, and each would spend the same seconds and memory on the same
imports. Here local rank 0 imports and forks; the others stay what they are, small: each hands its
environment and its output to the fork that runs its rank, passes signals on to it, and ends as it
ends. So torchrun sees N processes, and what it sees of them is true. A rank dies with its process
of torchrun's, and all die with the warm one: whoever is killed, nothing is left behind.
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
PASSED_ON = (signal.SIGTERM, signal.SIGINT)


@dataclass(frozen=True)
class Fork:
    """A forked rank, and the link to torchrun's process of that rank where this is not the warm one
    itself."""

    pid: int
    handle: int
    link: socket.socket | None

    def signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.handle, number)


def become_rank(prepare: Callable[[], object]) -> None:
    """Return in the process that is to run this rank, ``prepare`` having been called; the others
    end in here.

    Call it before anything starts a thread: a fork lacks its parent's threads, and would wait for
    their locks.
    """
    if os.environ["LOCAL_RANK"] != "0":
        _stand_for_fork()
    with socket.socket(socket.AF_UNIX) as door:
        door.bind(_address())
        door.listen()
        prepare()
        _fork_ranks(door, ranks=int(os.environ["LOCAL_WORLD_SIZE"]))


def fork() -> int:
    """Fork as ``os.fork`` does; the fork dies with this process and takes signals as a fresh
    process would."""
    parent = os.getpid()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        end_with(parent)
        for number in PASSED_ON:
            signal.signal(number, signal.SIG_DFL)
    return pid


def _fork_ranks(door: socket.socket, ranks: int) -> None:
    """Fork this process's own rank and one for every process that knocks; return in the forks.

    When all have ended, or the own rank has failed, this process ends as its own rank did.
    """
    selector = selectors.DefaultSelector()
    selector.register(door, selectors.EVENT_READ)

    def watch(pid: int, link: socket.socket | None = None) -> Fork:
        watched = Fork(pid, os.pidfd_open(pid), link)
        for end in filter(None, (watched.handle, link)):
            selector.register(end, selectors.EVENT_READ, watched)
        return watched

    if not (pid := fork()):
        return
    own = watch(pid)
    for number in PASSED_ON:
        signal.signal(number, lambda number, _: own.signal(number))
    status = 0
    while ranks:
        for key, _ in selector.select():
            one: Fork = key.data
            if key.fileobj is door:
                link, environment, outputs = _accept(door)
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
                if not numbers:  # the rank's process is gone
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


def _stand_for_fork() -> NoReturn:
    """Have this process's rank forked by the warm one, pass signals on to it, and end as it
    ends."""
    link = _knock()
    environment = json.dumps(dict(os.environ)).encode()
    socket.send_fds(link, [NUMBER.pack(len(environment))], [1, 2])
    link.sendall(environment)

    def pass_on(number: int, _: object) -> None:
        with suppress(BrokenPipeError):
            link.send(bytes([number]))

    for number in PASSED_ON:
        signal.signal(number, pass_on)
    ended = link.recv(NUMBER.size, socket.MSG_WAITALL)
    _end_as(NUMBER.unpack(ended)[0] if ended else -signal.SIGTERM)  # all die with the warm process


def _address() -> str:
    """The abstract socket where the processes meet that one torchrun started on this node."""
    run = (
        os.environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    )
    return "\0harness/" + "/".join([str(os.getppid()), *run])


def _knock() -> socket.socket:
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


def _accept(door: socket.socket) -> tuple[socket.socket, dict[str, str], list[int]]:
    """Return the link to a process that knocks, its environment, and its standard output and
    error."""
    link, _ = door.accept()
    _check_owner(link)
    size, outputs, _, _ = socket.recv_fds(link, NUMBER.size, 2)
    environment = link.recv(NUMBER.unpack(size)[0], socket.MSG_WAITALL)
    return link, json.loads(environment), outputs


def _check_owner(link: socket.socket) -> None:
    """Refuse a peer of another user: abstract sockets have no permissions, and an environment may
    hold secrets."""
    peer = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    if CREDENTIALS.unpack(peer)[1] != os.getuid():
        raise PermissionError(
            f"process {CREDENTIALS.unpack(peer)[0]} of another user uses this run's socket"
        )


def _end_as(status: int) -> NoReturn:
    """End this process as another ended: with its exit status, or by the signal ``-status``."""
    if status >= 0:
        os._exit(status)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if -status not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
    os._exit(128 - status)
