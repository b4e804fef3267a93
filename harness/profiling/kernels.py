"""The category of a kernel or operator, by its name."""

from __future__ import annotations

import functools
import re
from enum import StrEnum
from pathlib import Path

from harness.system import yaml_files


class Category(StrEnum):
    """What a moment of a step is spent on; of several at the same moment, the first one counts."""

    GEMM = "gemm"
    ATTENTION = "attention"
    ELEMENTWISE = "elementwise"
    OPTIMIZER = "optimizer"
    OTHER = "other"
    COMMUNICATION = "communication"
    MEMORY = "memory"
    LAUNCH_BOUND = "launch_bound"
    IDLE = "idle"


COMPUTE = frozenset(
    {Category.GEMM, Category.ATTENTION, Category.ELEMENTWISE, Category.OPTIMIZER, Category.OTHER}
)

TITLES = {
    Category.GEMM: "GEMM",
    Category.ATTENTION: "attention",
    Category.ELEMENTWISE: "normalisation, elementwise",
    Category.OPTIMIZER: "optimizer",
    Category.OTHER: "other kernels",
    Category.COMMUNICATION: "communication, exposed",
    Category.MEMORY: "memcpy, memset",
    Category.LAUNCH_BOUND: "idle: launch-bound",
    Category.IDLE: "idle: between kernels",
}

RULES = {
    Category(name): re.compile("|".join(patterns))
    for name, patterns in yaml_files.read(Path(__file__).with_suffix(".yaml")).items()
}


@functools.cache
def category_of(name: str) -> Category:
    """The category of a GPU kernel or a CPU operator; ``OTHER`` if no rule matches."""
    matching = (category for category, pattern in RULES.items() if pattern.search(name))
    return next(matching, Category.OTHER)
