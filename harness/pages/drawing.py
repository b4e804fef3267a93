"""An SVG that grows by shapes, in the colours of docs/, light and dark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

WIDTH, MARGIN = 860, 24
FONTS = "system-ui, -apple-system, Segoe UI, Helvetica, sans-serif"
STYLE = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")


class Drawing:
    """An SVG that grows by shapes. Coordinates and sizes are pixels; ``name`` is a class of
    STYLE."""

    def __init__(self, height: float, title: str) -> None:
        self.height, self.title, self.shapes = height, title, []

    def rect(self, x: float, y: float, width: float, height: float, name: str) -> None:
        self.shapes.append(
            f'<rect x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}" rx="2"'
            f' class="{name}"/>'
        )

    def text(
        self, x: float, y: float, label: str, name: str = "", size: int = 11, anchor: str = "start"
    ) -> None:
        if not label:
            return
        bold = ' font-weight="600"' * (size > 11)
        colour = f' class="{name}"' * bool(name)
        self.shapes.append(
            f'<text x="{_n(x)}" y="{_n(y)}" font-size="{size}" text-anchor="{anchor}"'
            f"{colour}{bold}>{escape(label)}</text>"
        )

    def path(self, points: Sequence[tuple[float, float]], name: str) -> None:
        """A line through the points, in the colour that ``name`` fills other shapes with."""
        places = " ".join(f"{_n(x)},{_n(y)}" for x, y in points)
        self.shapes.append(f'<polyline points="{places}" class="{name}"/>')

    def line(self, x1: float, y1: float, x2: float, y2: float, name: str) -> None:
        self.shapes.append(
            f'<line x1="{_n(x1)}" y1="{_n(y1)}" x2="{_n(x2)}" y2="{_n(y2)}" class="{name}"/>'
        )

    def dot(self, x: float, y: float, name: str) -> None:
        self.shapes.append(f'<circle cx="{_n(x)}" cy="{_n(y)}" r="4" class="{name}"/>')

    def legend(self, y: float, entries: Mapping[str, str]) -> None:
        """Labels and their classes, in as many lines as they need."""
        x = MARGIN
        for label, name in entries.items():
            width = 36 + 6.1 * len(label)
            if x + width > WIDTH:
                x, y = MARGIN, y + 18
            self.rect(x, y - 9, 11, 11, name)
            self.text(x + 16, y, label, "quiet")
            x += width

    def svg(self) -> str:
        card = (WIDTH - 1, self.height - 1)
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}"'
                f' width="{WIDTH}" height="{self.height}" role="img"'
                f' aria-label="{escape(self.title)}" font-family="{FONTS}">',
                f"<title>{escape(self.title)}</title>",
                f"<style>\n{STYLE}</style>",
                f'<rect x="0.5" y="0.5" width="{card[0]}" height="{card[1]}" rx="8"'
                ' class="paper rule"/>',
                *self.shapes,
                "</svg>",
                "",
            ]
        )


def _n(number: float) -> str:
    return f"{number:.1f}".rstrip("0").rstrip(".")
