"""Cleaning a corpus by rules that stand in YAML."""

from harness.data.clean.pipeline import CleanReport, Shard, clean
from harness.data.clean.rules import Rules, load_rules

__all__ = ["CleanReport", "Rules", "Shard", "clean", "load_rules"]
