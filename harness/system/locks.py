"""Locks on folders, which the kernel releases when their holder ends.

FOLDER/lock    locked with flock(2) while its holder lives; its text names the holder

flock decides among the processes of one machine, and needs no clock. Whether it works between
machines depends on the file system (NFS: yes; Lustre without -o flock and many FUSE mounts: no). So
the holder also writes a heartbeat to the file every ``HEARTBEAT_S``. A lock of another machine that
flock does not show is held while its heartbeat changes.
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
HEARTBEAT_S = 5.0
WATCH_S = 15.0
"""A lock of another machine whose heartbeat does not change for this long has a dead holder."""
RECENT_S = 60.0
"""A listing, which does not watch heartbeats, believes a lock whose file changed so recently."""
PROBE_S = 0.5
"""``holder`` takes a shared lock for a moment; ``take`` tries again for this long."""
SIZE_BYTES = 512
"""Of the file's text. It is rewritten in place: flock belongs to the file, not to its name."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock.

    Attributes:
        pid: its number on ``host``, or in its container there.
        boot: the kernel's id of this boot of the machine.
        start: when the process started, in clock ticks since boot (proc(5)); a later process with
            the same pid has another.
        token: random, of this lock: another machine can check that it sees the same file.
        beat: the heartbeat, a counter.
    """

    host: str
    pid: int
    boot: str
    start: int
    token: str
    beat: int = 0

    @property
    def is_here(self) -> bool:
        """Whether it is a process of this boot of this machine."""
        return self.boot == _boot()

    @property
    def lives(self) -> bool:
        """Whether it is a living process in this container; elsewhere its pid means nothing."""
        return self._is_in_this_container and _start(self.pid) == self.start

    @property
    def _is_in_this_container(self) -> bool:
        return self.is_here and self.host == socket.gethostname()

    def __str__(self) -> str:
        # the lock is inherited: it is held until the last process of a run has ended
        killed = self._is_in_this_container and not self.lives
        ending = ", which was killed; processes it started are still ending" if killed else ""
        return f"process {self.pid} on {self.host}{ending}"


class Taken(UserError):
    """Another process holds the lock."""

    def __init__(self, folder: Path, holder: Holder | None) -> None:
        super().__init__(f"{folder} is in use by {holder or 'another process'}")
        self.holder = holder


def take(folder: Path, report: Callable[[str], None] = lambda _: None) -> None:
    """Lock ``folder`` until ``release``, or until all processes that inherited the lock have ended.

    Args:
        report: called with a line where another machine's lock has to be watched for ``WATCH_S``.

    Raises:
        Taken: another process holds the lock.
        OSError: the lock file cannot be made.
    """
    path = _file(folder)
    if path in _held:
        return
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        reaches = _flock_for(descriptor, PROBE_S)
        earlier = _read(descriptor)
        # the folder may have been removed, and made again, between open and flock
        if reaches and path.stat().st_ino != os.fstat(descriptor).st_ino:
            raise FileNotFoundError(f"{path} was removed")
        if earlier and not (reaches and earlier.is_here):
            report(
                f"{folder} was locked by {earlier}: watching for {WATCH_S:.0f} s whether it "
                "still is"
            )
            if _with_heartbeat({path: earlier}):
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
        if not _heartbeat_runs.is_set():
            _heartbeat_runs.set()
            threading.Thread(target=_beat, name="locks", daemon=True).start()


def release(folder: Path) -> None:
    """Unlock ``folder`` if this process holds its lock; the folder may be gone."""
    with _guard:
        descriptor, _ = _held.pop(_file(folder), (None, None))
    if descriptor is not None:
        os.ftruncate(descriptor, 0)
        os.close(descriptor)


def holder(folder: Path, watch: bool = True) -> Holder | None:
    """The living process that holds the lock of ``folder``, or None.

    Args:
        watch: wait up to ``WATCH_S`` for a heartbeat where the lock is another machine's. Without,
            the age of the file decides.
    """
    return holders([folder], watch).get(folder)


def holders(folders: Iterable[Path], watch: bool = True) -> dict[Path, Holder]:
    """The ``holder`` of each locked folder; all heartbeats are watched at the same time."""
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
    if watch and unclear:
        alive = _with_heartbeat(unclear)
    else:
        alive = [path for path in unclear if _is_recent(path)]
    return found | {folder_of[path]: unclear[path] for path in alive}


def is_visible(folder: Path, token: str) -> bool:
    """Whether ``folder``, as this machine sees it, has the lock with ``token``."""
    try:
        known = _parse(_file(folder).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError):
        return False
    return known is not None and known.token == token


def own(folder: Path) -> Holder | None:
    """This process's lock on ``folder``; None where it holds none."""
    return _held.get(_file(folder), (None, None))[1]


def descriptors(*folders: Path) -> tuple[int, ...]:
    """File descriptors of this process's locks; a child that inherits them keeps the folders
    locked."""
    return tuple(_held[path][0] for path in map(_file, folders) if path in _held)


_held: dict[Path, tuple[int, Holder]] = {}
_guard = threading.Lock()
_heartbeat_runs = threading.Event()


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
    """Take the lock; False where this file system has none.

    Raises:
        BlockingIOError: another process holds it.
    """
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
        time.sleep(HEARTBEAT_S)
        beat += 1
        with _guard:
            for descriptor, holder in _held.values():
                with suppress(OSError):  # the folder was removed, or its disk is full or gone
                    _write(descriptor, holder, beat)


def _with_heartbeat(locks: dict[Path, Holder]) -> list[Path]:
    """Those of ``locks`` whose heartbeat changes within ``WATCH_S``."""
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
    os.pwrite(descriptor, f"{text:{SIZE_BYTES - 1}}\n".encode(), 0)
    os.fsync(descriptor)  # other machines see it only then


def _read(descriptor: int) -> Holder | None:
    return _parse(os.pread(descriptor, SIZE_BYTES, 0).decode(errors="replace"))


def _parse(text: str) -> Holder | None:
    """The holder in ``text``; None where the lock was released, or the text is damaged."""
    try:
        known = json_object(text) or {}
        return Holder(**{key: kind(known[key]) for key, kind in _FIELDS.items()})
    except (KeyError, TypeError, ValueError):
        return None


_FIELDS = {"host": str, "pid": int, "boot": str, "start": int, "token": str, "beat": int}


def _boot() -> str:
    """The kernel's id of this boot; the machine's name where there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _start(pid: int) -> int | None:
    """When process ``pid`` started, in clock ticks since boot; None where it does not run."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else int(fields[18])
