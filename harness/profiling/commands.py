"""``make profile``."""

from __future__ import annotations

from collections.abc import Mapping

from harness import RECORDS
from harness.profiling.profile import print_profile
from harness.run import finding


def profile(settings: Mapping[str, str]) -> int:
    """Print where the time of a traced step goes."""
    return print_profile(finding.outdir(settings), RECORDS, settings)
