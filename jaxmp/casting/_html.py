"""The page of `explain(...).to_html`: one file, nothing loaded from anywhere."""

import html
from collections.abc import Sequence

_STYLE = """
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em; color: #222; }
table { border-collapse: collapse; width: 100%; }
th { position: sticky; top: 0; background: #fff; text-align: left; }
th, td { padding: 2px 10px; border-bottom: 1px solid #e4e4e4; vertical-align: top; }
td:nth-child(4), td:nth-child(5), td:nth-child(1) { font-family: monospace; }
tr.compute td:first-child { border-left: 4px solid #2a8a3e; }
tr.full td:first-child { border-left: 4px solid #c43c2c; }
tr.follow td:first-child { border-left: 4px solid #3a6ec4; }
tr.untouched td { color: #888; }
label { margin-right: 1em; }
"""
_SCRIPT = """
for (const box of document.querySelectorAll('input')) box.onchange = () => {
  for (const row of document.querySelectorAll('tr.' + box.value))
    row.style.display = box.checked ? '' : 'none';
};
"""


def page(columns: Sequence[str], rows: Sequence[Sequence[str]], summary: str) -> str:
    """Writes the page.

    Args:
      columns: their names; the sixth holds the class of an operation.
      rows: their cells.
      summary: one line under the title.
    """
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    body = "\n".join(
        f'<tr class="{html.escape(row[5])}">'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        + "</tr>"
        for row in rows
    )
    boxes = "".join(
        f'<label><input type="checkbox" value="{name}" checked> {name}</label>'
        for name in ("compute", "full", "follow", "untouched")
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>autocast</title><style>{_STYLE}</style></head><body>"
        f"<h1>What autocast decided</h1><p>{html.escape(summary)}</p><p>{boxes}</p>"
        f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"
        f"<script>{_SCRIPT}</script></body></html>\n"
    )
