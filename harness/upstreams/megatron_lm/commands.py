"""``make arguments``."""

from __future__ import annotations

from collections.abc import Mapping

from harness.upstreams.megatron_lm.arguments import print_arguments


def arguments(settings: Mapping[str, str]) -> int:
    """Print the arguments of Megatron-LM, or those with MATCH in their names."""
    return print_arguments(settings.get("MATCH"))
