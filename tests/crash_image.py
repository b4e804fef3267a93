"""An ext4 file system in a file, mounted through a loop device, whose power can be cut: for tests of what lasts.

``EXT4_IOC_SHUTDOWN`` with ``NOLOGFLUSH`` (fs/ext4/ioctl.c) stops the file system as a power cut does: what was not synced
is gone when it is mounted again.
"""

import fcntl
import os
import shutil
import struct
import subprocess
from pathlib import Path

SHUTDOWN = 0x8004587D
"""_IOR('X', 125, __u32), include/uapi/linux/ext4.h"""
NO_LOG_FLUSH = 2


class CrashImage:
    """A file system of ``mib`` MiB below ``folder``. Raises OSError where loop devices or mounts are not allowed."""

    def __init__(self, folder: Path, mib: int = 512) -> None:
        self.image, self.root = folder / "disk.img", folder / "disk"
        self.root.mkdir()
        if os.geteuid() or not shutil.which("mkfs.ext4"):
            raise PermissionError("root and mkfs.ext4 are needed")
        with self.image.open("wb") as file:
            file.truncate(mib * 2**20)
        self._run("mkfs.ext4", "-q", "-F", self.image)
        self.mount()

    def mount(self) -> None:
        self._run("mount", "-o", "loop", self.image, self.root)

    def stop(self) -> None:
        """Cut the power: what was not synced is lost, and nothing more can be written."""
        handle = os.open(self.root, os.O_RDONLY)
        try:
            fcntl.ioctl(handle, SHUTDOWN, struct.pack("I", NO_LOG_FLUSH))
        finally:
            os.close(handle)

    def restart(self) -> None:
        """Have the power back. No process may have a file open."""
        self.unmount()
        self.mount()

    def unmount(self) -> None:
        self._run("umount", self.root)

    @staticmethod
    def _run(*words) -> None:
        done = subprocess.run(list(map(str, words)), capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"{words[0]}: {done.stderr.strip()}")
