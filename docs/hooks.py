"""Hooks of the documentation site: math without scripts, and nothing fetched from elsewhere.

Pages write math as GitHub reads it: a fenced block of language `math`, and $`...`$ inside a line.
Both become MathML, which browsers draw by themselves.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

_BLOCK = re.compile(r"^```math\n(.*?)\n```$", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"\$`([^`]+)`\$")
_FETCHED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
_CSS_ADDRESS = re.compile(r"(?:url\(\s*[\"']?|@import\s+[\"'])(?:https?:)?//", re.IGNORECASE)


def on_page_markdown(markdown: str, **_: object) -> str:
    """Turn math into MathML."""
    markdown = _BLOCK.sub(
        lambda found: f'<div class="equation">{convert(found[1], display="block")}</div>', markdown
    )
    # The span keeps a formula at a line's start from ending the paragraph.
    return _INLINE.sub(lambda found: f"<span>{convert(found[1])}</span>", markdown)


class _Resources(HTMLParser):
    """Collects the addresses that a browser loads with a page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "link" and found.get("rel") in ("canonical", "next", "prev", "alternate"):
            return
        self.addresses.append(found.get(_FETCHED.get(tag, "")) or "")


def on_post_page(output: str, page: object, **_: object) -> str:
    """Refuse a page that loads something from another host."""
    resources = _Resources()
    resources.feed(output)
    _refuse(str(page), [a for a in resources.addresses if re.match(r"(https?:)?//", a)])
    return output


def on_post_build(config: dict, **_: object) -> None:
    """Refuse a style sheet that loads something from another host."""
    for sheet in Path(config["site_dir"]).rglob("*.css"):
        _refuse(sheet.name, _CSS_ADDRESS.findall(sheet.read_text(encoding="utf-8")))


def _refuse(where: str, addresses: list[str]) -> None:
    if addresses:
        raise PluginError(f"{where} loads from another host: {addresses[0]}")
