"""One HTML page that needs nothing else: pictures inside, no script, no network, for light and dark screens."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape

from .tables import Table

__all__ = ["page"]

STYLE = """
:root { color-scheme: light dark;
  --text: #1c2128; --dim: #59626e; --back: #ffffff; --line: #d7dce2; --stripe: #f5f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --text: #e2e6eb; --dim: #9aa4b0; --back: #14181d; --line: #333b45; --stripe: #1b2027; }
}
body { font: 15px/1.45 system-ui, sans-serif; color: var(--text); background: var(--back); margin: 2rem auto;
  max-width: 75rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p { max-width: 60rem; color: var(--dim); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 0.22rem 0.6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th { color: var(--dim); font-weight: 600; white-space: nowrap; }
th:first-child, td:first-child, .text td { text-align: left; }
tbody tr:nth-child(even) { background: var(--stripe); }
img { max-width: 100%; background: #ffffff; border: 1px solid var(--line); border-radius: 4px; }
"""
# Tables of words rather than of numbers.
TEXTS = ("Measured on", "Without a number")


def page(title: str, introduction: str, tables: Sequence[Table], pictures: Mapping[str, tuple[str, bytes]]) -> str:
    """The whole document; `pictures` maps a heading to a caption and the bytes of a PNG."""
    parts = [_table(table) for table in tables[:1]]
    parts += [_picture(heading, *picture) for heading, picture in pictures.items()]
    parts += [_table(table) for table in tables[1:]]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n<p>{escape(introduction)}</p>\n" + "\n".join(parts) + "\n</body>\n</html>\n"
    )


def _table(table: Table) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in table.header)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    kind = ' class="text"' if table.title in TEXTS else ""
    note = f"<p>{escape(table.note)}</p>\n" if table.note else ""
    return (
        f"<h2>{escape(table.title)}</h2>\n{note}"
        f'<div class="scroll"><table{kind}>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'
    )


def _picture(heading: str, caption: str, png: bytes) -> str:
    data = base64.b64encode(png).decode("ascii")
    return (
        f"<h2>{escape(heading)}</h2>\n<p>{escape(caption)}</p>\n"
        f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
    )
