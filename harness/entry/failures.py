"""How a failing rank ends: its error is recorded, and it exits at once."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from harness.errors import UserError

if TYPE_CHECKING:
    from harness.entry.report import RankReport


@contextmanager
def ended_at_once(report: "RankReport | None") -> Iterator[None]:
    """Exit at the first exception: with status 2 for a UserError, else 1 or upstream's own.

    Nothing is torn down: destroying process groups waits for ranks that may be gone.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code in (None, 0):
            return
        status = 1
        if isinstance(error, UserError):
            print(f"error: {error}", file=sys.stderr)
            status = 2
        elif not isinstance(error, SystemExit):
            traceback.print_exception(error)
        elif isinstance(error.code, int):
            status = error.code
        else:
            print(error.code, file=sys.stderr)
        if report:
            report.failed(error)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
