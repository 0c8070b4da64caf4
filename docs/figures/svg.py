"""Draw an SVG that reads well on light and dark pages, with the standard library alone."""

from __future__ import annotations

from xml.sax.saxutils import escape

# A color has a name; the page's preference decides which of its two values is shown.
COLORS = {
    "card": ("#ffffff", "#161b22"),
    "edge": ("#d0d7de", "#3d444d"),
    "cell": ("#eef1f4", "#262c36"),
    "text": ("#1f2328", "#e6edf3"),
    "muted": ("#59636e", "#9198a1"),
    "row": ("#2f6fd0", "#6cabff"),
    "good": ("#1a7f37", "#4ac26b"),
    "bad": ("#c4301c", "#ff7b6e"),
    "warm": ("#9a5b00", "#e0a33e"),
}
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', Arial, sans-serif"
SIZE = 14


class Drawing:
    """A card of fixed size with shapes on it; every color is a name from COLORS."""

    def __init__(self, width: float, height: float, title: str):
        self.width, self.height, self.title = width, height, title
        self._shapes: list[str] = []

    def rect(
        self, x: float, y: float, width: float, height: float, fill: str = "cell",
        *, edge: str = "", opacity: float = 1.0, radius: float = 2.0, dashed: bool = False,
    ) -> None:  # fmt: skip
        """Add a rectangle; `fill` or `edge` may be empty."""
        style = f'class="f-{fill}"' if fill else 'fill="none"'
        if edge:
            style = f'class="{f"f-{fill} " if fill else ""}s-{edge}"' + (
                "" if fill else ' fill="none"'
            )
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        opaque = "" if opacity == 1 else f' fill-opacity="{opacity:g}"'
        self._shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" '
            f"{style}{opaque}{dash}/>"
        )

    def text(
        self, x: float, y: float, content: str, color: str = "text",
        *, size: float = SIZE, anchor: str = "start", bold: bool = False, italic: bool = False,
    ) -> None:  # fmt: skip
        """Add one line of text; y is its baseline."""
        weight = ' font-weight="600"' if bold else ""
        slant = ' font-style="italic"' if italic else ""
        self._shapes.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" text-anchor="{anchor}" '
            f'class="f-{color}"{weight}{slant}>{escape(content)}</text>'
        )

    def line(
        self, x1: float, y1: float, x2: float, y2: float, color: str = "muted",
        *, width: float = 1.5, dashed: bool = False, arrow: bool = False,
    ) -> None:  # fmt: skip
        """Add a line, with an arrow head at its second end if asked for."""
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        head = f' marker-end="url(#arrow-{color})"' if arrow else ""
        self._shapes.append(
            f'<path d="M{x1:g} {y1:g}L{x2:g} {y2:g}" class="s-{color}" stroke-width="{width:g}" '
            f'fill="none"{dash}{head}/>'
        )

    def svg(self) -> str:
        """Return the whole file."""
        light, dark = (
            "".join(
                f".f-{name}{{fill:{values[index]}}}.s-{name}{{stroke:{values[index]}}}"
                for name, values in COLORS.items()
            )
            for index in (0, 1)
        )
        body = "\n".join(self._shapes)
        heads = "".join(
            f'<marker id="arrow-{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
            f'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" class="f-{name}"/></marker>'
            for name in COLORS
            if f"#arrow-{name})" in body
        )
        width, height = self.width, self.height
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
            f'width="{width:g}" height="{height:g}" font-family="{FONT}" role="img">\n'
            f"<title>{escape(self.title)}</title>\n"
            f"<style>{light}@media (prefers-color-scheme: dark){{{dark}}}</style>\n"
            f"<defs>{heads}</defs>\n"
            f'<rect x=".5" y=".5" width="{width - 1:g}" height="{height - 1:g}" rx="8" '
            'class="f-card s-edge"/>\n'
            f"{body}\n</svg>\n"
        )
