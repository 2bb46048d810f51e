"""One page that needs nothing else: tables, pictures and how the numbers came about, in one HTML file."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem;
       color: #1a1a1a; background: #fff; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
div.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.8rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th:first-child { text-align: left; }
img { max-width: 100%; height: auto; }
p.note, li { color: #444; } code { background: #f2f2f2; padding: 0.1rem 0.3rem; overflow-wrap: anywhere; }
"""


def section(title: str, *parts: str) -> str:
    """Give a headed section of finished parts."""
    return f"<h2>{escape(title)}</h2>\n" + "\n".join(parts)


def paragraph(text: str) -> str:
    """Give plain text as a paragraph."""
    return f'<p class="note">{escape(text)}</p>'


def command(text: str) -> str:
    """Give a command line."""
    return f"<p><code>{escape(text)}</code></p>"


def listed(lines: Sequence[str]) -> str:
    """Give plain lines as a list."""
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def wide(table: str) -> str:
    """Let a table scroll by itself where the window is narrower."""
    return f'<div class="wide">{table}</div>'


def picture(path: Path, description: str) -> str:
    """Give a PNG, inside the page itself."""
    content = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<p><img src="data:image/png;base64,{content}" alt="{escape(description, quote=True)}"></p>'


def write_page(path: Path, title: str, sections: Sequence[str]) -> None:
    """Write the page."""
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style>"
    )
    body = "\n".join([f"<h1>{escape(title)}</h1>", *sections])
    path.write_text(
        f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n',
        encoding="utf-8",
    )
