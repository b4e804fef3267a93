"""Comparisons that work with numbers and, element by element, with arrays (harness/search)."""

from __future__ import annotations


def larger(one: float, other: float) -> float:
    """The larger of two numbers."""
    return (one + other + abs(one - other)) / 2


def smaller(one: float, other: float) -> float:
    """The smaller of two numbers."""
    return (one + other - abs(one - other)) / 2
