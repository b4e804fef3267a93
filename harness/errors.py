"""Errors for users: what is wrong, with its values, and how to fix it."""

import math
from collections.abc import Iterable
from difflib import SequenceMatcher, get_close_matches


class UserError(Exception):
    """A mistake the user can fix: the command line prints ``error: …`` and exits with status 2."""


def first_line(error: BaseException) -> str:
    """The first line of the message of ``error``; its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def similar(name: str, valid: Iterable[str]) -> str | None:
    """``did you mean 408, 418?``; None where no valid name is close."""
    close = _closest(name, list(valid), 3, 0.6)
    return _question(close) if close else None


def nearest(name: str, valid: Iterable[str], n: int = 5) -> str:
    """The valid names closest to ``name``, as the end of a message: ``did you mean 408, 418?``.

    Where none is close, all valid names if they are few, else the first ``n``.
    """
    valid = list(valid)
    if not valid:
        return "there are none"
    close = _closest(name, valid, n, 0.5) or [v for v in valid if name and name in v][:n]
    if close:
        return _question(close)
    shown = valid if len(valid) <= 12 else [*valid[:n], f"… ({len(valid)} in all)"]
    return f"valid: {', '.join(shown)}"


def indivisible(what: str, whole: int, by: str, *factors: int) -> str | None:
    """The complaint that ``whole`` is not divisible by the product of ``factors``, if it is not."""
    product = math.prod(factors)
    if whole % product == 0:
        return None
    values = " x ".join(map(str, factors)) + (f" = {product}" if len(factors) > 1 else "")
    return f"{what} ({whole}) must be divisible by {by} ({values})"


def _closest(name: str, valid: list[str], n: int, cutoff: float) -> list[str]:
    """The ``n`` most similar names; equally similar ones in the order of ``valid``."""
    close = get_close_matches(name, valid, len(valid) or 1, cutoff)
    return sorted(
        close, key=lambda one: (-SequenceMatcher(None, one, name).ratio(), valid.index(one))
    )[:n]


def _question(names: list[str]) -> str:
    return f"did you mean {', '.join(names)}?"
