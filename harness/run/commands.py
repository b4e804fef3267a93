"""``make clean`` and ``make tensorboard``."""

from __future__ import annotations

from collections.abc import Mapping

from harness.run import finding


def clean(settings: Mapping[str, str]) -> int:
    """Remove runs that failed and cannot be resumed; ALL=1 removes every run."""
    from harness.run import cleaning

    return cleaning.clean(
        finding.outdir(settings),
        everything=settings.get("ALL") == "1",
        agreed=settings.get("YES") == "1",
    )


def tensorboard(settings: Mapping[str, str]) -> int:
    """Show the curves of runs in a browser."""
    from harness.run import tensorboard

    return tensorboard.show(settings, finding.outdir(settings))
