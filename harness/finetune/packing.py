"""Packs conversations into sequences: best fit, the longest first."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Pack items into bins of size ``room`` by best-fit decreasing.

    It needs at most 11/9 of the optimal number of bins, plus a constant (Johnson 1974).

    Args:
        lengths: of the items, each between 1 and ``room``.

    Returns:
        The items' numbers, bin by bin.
    """
    bins: list[list[int]] = []
    with_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[item]
        at = bisect_left(rooms, length)
        if at == len(rooms):
            chosen, left = len(bins), room
            bins.append([])
        else:
            left = rooms[at]
            chosen = with_room[left].pop()
            if not with_room[left]:
                del with_room[left], rooms[at]
        bins[chosen].append(item)
        left -= length
        if left:
            if left not in with_room:
                insort(rooms, left)
            with_room.setdefault(left, []).append(chosen)
    return bins
