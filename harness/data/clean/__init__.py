"""Cleans a corpus by rules from a YAML file."""

from harness.data.clean.pipeline import CleanReport, clean
from harness.data.clean.rules import Rules, load_rules

__all__ = ["CleanReport", "Rules", "clean", "load_rules"]
