"""Round ticks for axes, in SVG files and on the report's page."""

from __future__ import annotations

import math

FACTORS = (1.0, 2.0, 2.5, 5.0)
"""A tick size is one of these, times a power of ten."""
SIZES = tuple(factor * 10.0**power for power in range(-9, 13) for factor in FACTORS)
"""Every tick size, ascending: from 10^-9 to 5 x 10^12."""


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from at or below ``low`` to at or above ``high``, about ``most`` intervals."""
    rough = (high - low or 1.0) / most
    size = next((size for size in SIZES if size >= rough * 0.9999), rough)
    first = math.floor(low / size + 1e-9)
    last = max(math.ceil(high / size - 1e-9), first + 1)
    return [round(i * size, 10) for i in range(first, last + 1)]
