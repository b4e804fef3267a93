"""Wrappers of standard output and error, whose reader may end first: ``make 101 | head``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO


class Wrapped:
    """A text stream whose ``write`` a subclass replaces."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class LastingStream(Wrapped):
    """A text stream that drops output once its reader has ended, instead of BrokenPipeError."""

    def write(self, text: str) -> int:
        return self._lasting(self.stream.write, text)

    def flush(self) -> None:
        self._lasting(self.stream.flush)

    def _lasting(self, act: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return act(*arguments)
        except BrokenPipeError:
            # Replace the descriptor, not only this object: buffered output and processes that start
            # later use it, too.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
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
