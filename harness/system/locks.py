"""Locks on folders: which living process has one, by a lock that the kernel releases when that
process ends.

FOLDER/lock    locked with flock(2) for as long as its holder lives; the text in it says who that is

flock decides among the processes of one machine, and reads no clock. Whether it reaches other
machines depends on the file system (NFS: yes; Lustre without -o flock and many FUSE mounts: no). So
the holder also counts in the file, every ``BEAT_S``: a lock of another machine that flock does not
show is held for as long as its count goes on.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from harness.errors import UserError
from harness.system.files import json_object

FILE = "lock"
BEAT_S = 5.0
"""The holder counts on in its file this often."""
WATCH_S = 15.0
"""The count of another machine's lock is watched for this long before its holder counts as dead."""
RECENT_S = 60.0
"""A listing, which does not watch, believes a lock of another machine whose file changed so
recently."""
PROBES_S = 0.5
"""Others look whether a lock is free by taking it for a moment; that is over within this time."""
SIZE = 512
"""Bytes of the file's text: it is rewritten in place, for flock belongs to the file and not to its
name."""


@dataclass(frozen=True)
class Holder:
    """The process that has a folder: its machine, by name and by the kernel's boot, and its number
    there.

    Attributes:
        start: when it started, in clock ticks since boot (proc(5)): no other process of that number
        has the same.
        token: of this one lock, so that another machine can tell that it sees the same file.
        beat: how often it has counted.
    """

    host: str
    pid: int
    boot: str
    start: int
    token: str
    beat: int = 0

    @property
    def is_here(self) -> bool:
        """Whether it is a process of this machine, since its last boot."""
        return self.boot == _boot()

    @property
    def lives(self) -> bool:
        """Whether it is a living process here; its number means nothing in another container of
        this machine."""
        return self._is_in_this_container and _start(self.pid) == self.start

    @property
    def _is_in_this_container(self) -> bool:
        return self.is_here and self.host == socket.gethostname()

    def __str__(self) -> str:
        killed = self._is_in_this_container and not self.lives
        ending = ", which was killed; what it started is still ending" if killed else ""
        return f"process {self.pid} on {self.host}{ending}"


class Taken(UserError):
    """Another process has the folder."""

    def __init__(self, folder: Path, holder: Holder | None) -> None:
        super().__init__(f"{folder} is in use by {holder or 'another process'}")
        self.holder = holder


def take(folder: Path, tell: Callable[[str], None] = lambda _: None) -> None:
    """Have ``folder`` to this process, until ``release`` or until it and what inherited the lock
    have ended.

    Args:
        tell: called with a line where another machine's lock has to be watched for ``WATCH_S``.

    Raises:
        Taken: another process has it.
        OSError: the lock file cannot be made.
    """
    path = _file(folder)
    if path in _held:
        return
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        reaches = _flock_for(descriptor, PROBES_S)
        earlier = _read(descriptor)
        if reaches and path.stat().st_ino != os.fstat(descriptor).st_ino:
            raise FileNotFoundError(f"{path} was removed")
        if earlier and not (reaches and earlier.is_here):
            tell(
                f"{folder} was locked by {earlier}: watching for {WATCH_S:.0f} s whether it"
                " still is"
            )
            if _count_goes_on({path: earlier}):
                raise Taken(folder, earlier)
        own = Holder(
            socket.gethostname(),
            os.getpid(),
            _boot(),
            _start(os.getpid()) or 0,
            secrets.token_hex(8),
        )
        _write(descriptor, own)
    except BlockingIOError:
        holder = _read(descriptor)
        os.close(descriptor)
        raise Taken(folder, holder) from None
    except BaseException:
        os.close(descriptor)
        raise
    with _guard:
        _held[path] = (descriptor, own)
        if not _beating.is_set():
            _beating.set()
            threading.Thread(target=_beat, name="locks", daemon=True).start()


def release(folder: Path) -> None:
    """Give ``folder`` back, where this process has it; the folder may be gone."""
    with _guard:
        descriptor, _ = _held.pop(_file(folder), (None, None))
    if descriptor is not None:
        os.ftruncate(descriptor, 0)
        os.close(descriptor)


def holder(folder: Path, watch: bool = True) -> Holder | None:
    """The living process that has ``folder``, or None.

    Args:
        watch: wait up to ``WATCH_S`` where only the count of another machine's lock can tell; else
        its file's age must do.
    """
    return holders([folder], watch).get(folder)


def holders(folders: Iterable[Path], watch: bool = True) -> dict[Path, Holder]:
    """Who has which of ``folders``, as ``holder``; all counts are watched at once."""
    found: dict[Path, Holder] = {}
    unclear: dict[Path, Holder] = {}
    folder_of = {_file(folder): folder for folder in folders}
    for path, folder in folder_of.items():
        try:
            descriptor = os.open(path, os.O_RDONLY)
        except OSError:
            continue
        try:
            reaches = _flock(descriptor, fcntl.LOCK_SH)
            known = _read(descriptor)
            if known and not (reaches and known.is_here):
                unclear[path] = known
        except BlockingIOError:
            found[folder] = _read(descriptor) or Holder("this machine", 0, "", 0, "")
        finally:
            os.close(descriptor)
    alive = (
        _count_goes_on(unclear)
        if watch and unclear
        else [path for path in unclear if _is_recent(path)]
    )
    return found | {folder_of[path]: unclear[path] for path in alive}


def is_visible(folder: Path, token: str) -> bool:
    """Whether ``folder`` is here the one that a lock with ``token`` lies in."""
    try:
        known = _parse(_file(folder).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return False
    return known is not None and known.token == token


def own(folder: Path) -> Holder | None:
    """This process's lock on ``folder``, if it has it."""
    return _held.get(_file(folder), (None, None))[1]


def descriptors(*folders: Path) -> tuple[int, ...]:
    """File descriptors of locks that this process has: who inherits them has the folders for as
    long as it lives."""
    return tuple(_held[path][0] for path in map(_file, folders) if path in _held)


_held: dict[Path, tuple[int, Holder]] = {}
_guard = threading.Lock()
_beating = threading.Event()


def _file(folder: Path) -> Path:
    return folder.resolve() / FILE


def _flock_for(descriptor: int, seconds: float) -> bool:
    """Take the lock within ``seconds``, as ``_flock``."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return _flock(descriptor, fcntl.LOCK_EX)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _flock(descriptor: int, kind: int) -> bool:
    """Take the lock; False where this file system has none. Raises BlockingIOError where another
    process has it."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def _beat() -> None:
    beat = 0
    while True:
        time.sleep(BEAT_S)
        beat += 1
        with _guard:
            for descriptor, holder in _held.values():
                with suppress(OSError):  # the folder was removed, or its disk is full or gone
                    _write(descriptor, holder, beat)


def _count_goes_on(locks: dict[Path, Holder]) -> list[Path]:
    """Those of ``locks`` whose count changes within ``WATCH_S``."""
    left, alive = dict(locks), []
    deadline = time.monotonic() + WATCH_S
    while left and time.monotonic() < deadline:
        time.sleep(min(0.2, WATCH_S / 10))
        for path, seen in list(left.items()):
            with suppress(OSError, UnicodeDecodeError):
                now = _parse(path.read_text(encoding="utf-8"))
                if now and (now.token, now.beat) != (seen.token, seen.beat):
                    alive.append(path)
                    del left[path]
    return alive


def _is_recent(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime < RECENT_S
    except OSError:
        return False


def _write(descriptor: int, holder: Holder, beat: int = 0) -> None:
    text = json.dumps({**asdict(holder), "beat": beat})
    os.pwrite(descriptor, f"{text:{SIZE - 1}}\n".encode(), 0)
    os.fsync(descriptor)


def _read(descriptor: int) -> Holder | None:
    return _parse(os.pread(descriptor, SIZE, 0).decode(errors="replace"))


def _parse(text: str) -> Holder | None:
    """Who the text names; None where the lock was given back, or the text is damaged."""
    try:
        known = json_object(text) or {}
        return Holder(**{key: kind(known[key]) for key, kind in _FIELDS.items()})
    except (KeyError, TypeError, ValueError):
        return None


_FIELDS = {"host": str, "pid": int, "boot": str, "start": int, "token": str, "beat": int}


def _boot() -> str:
    """What tells this boot of this machine from others; its name where the kernel does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _start(pid: int) -> int | None:
    """When process ``pid`` started, in clock ticks since boot; None where there is none, or it is a
    zombie."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(fields[18])
