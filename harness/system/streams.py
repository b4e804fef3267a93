"""Standard output and error whose reader may end first, as in ``make 101 | head``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO


class LastingStream:
    """A text stream that drops output once its reader has ended, instead of BrokenPipeError."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._lasting(self._stream.write, text)

    def writelines(self, lines: Any) -> None:
        self._lasting(self._stream.writelines, lines)

    def flush(self) -> None:
        self._lasting(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _lasting(self, act: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return act(*arguments)
        except BrokenPipeError:
            # Replace the descriptor, not only this object: buffered output and processes that start
            # later use it, too.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            return act(*arguments)


@contextmanager
def lasting_output() -> Iterator[None]:
    """In this context, the end of a reader of standard output or error raises nothing."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(LastingStream, before)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before
