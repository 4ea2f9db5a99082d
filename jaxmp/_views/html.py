"""Pages that are one file and load nothing: what `to_html` methods write."""

import base64
import html
from collections.abc import Callable, Iterable, Sequence

_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 90em;
       padding: 0 1em; color: #222; }
table { border-collapse: collapse; width: 100%; margin: 0.5em 0 1.5em; }
th { position: sticky; top: 0; background: #fff; text-align: left; }
th, td { padding: 2px 10px; border-bottom: 1px solid #e4e4e4; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
td.code { font-family: ui-monospace, monospace; }
tr.good td:first-child { border-left: 4px solid #2a8a3e; }
tr.bad td:first-child { border-left: 4px solid #c43c2c; }
tr.note td:first-child { border-left: 4px solid #3a6ec4; }
tr.quiet td { color: #888; }
label { margin-right: 1em; }
img, svg { max-width: 100%; }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto; }
"""
_FILTER = """
for (const box of document.querySelectorAll('input')) box.onchange = () => {
  for (const row of document.querySelectorAll('tr[data-kind="' + box.value + '"]'))
    row.style.display = box.checked ? '' : 'none';
};
"""


def page(title: str, *parts: str) -> str:
    """Writes a page.

    Args:
      title: its heading, plain text.
      *parts: HTML, such as `table` and `paragraph` return.
    """
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{html.escape(title)}</h1>{''.join(parts)}"
        f"<script>{_FILTER}</script></body></html>\n"
    )


def writer(title: str, *parts: str) -> Callable[[str], None]:
    """Returns what writes a page into a file that it is given."""

    def write(path: str) -> None:
        with open(path, "w", encoding="utf-8") as file:
            file.write(page(title, *parts))

    return write


def heading(text: str) -> str:
    """A heading inside a page."""
    return f"<h2>{html.escape(text)}</h2>"


def paragraph(text: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{html.escape(text)}</p>"


def preformatted(text: str) -> str:
    """Text whose spaces and line ends are kept."""
    return f"<pre>{html.escape(text)}</pre>"


def image(png: bytes, text: str) -> str:
    """A picture that is part of the page.

    Args:
      png: the picture.
      text: what it shows, for people who do not see it.
    """
    data = base64.b64encode(png).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{html.escape(text)}">'


def checkboxes(kinds: Iterable[str]) -> str:
    """One box for each kind of row, which shows and hides the rows of that kind."""
    boxes = (
        f'<label><input type="checkbox" value="{html.escape(kind)}" checked> '
        f"{html.escape(kind)}</label>"
        for kind in kinds
    )
    return f"<p>{''.join(boxes)}</p>"


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    code: Sequence[str] = (),
    styles: Sequence[str] = (),
    kinds: Sequence[str] = (),
) -> str:
    """Writes a table; cells that are numbers are set to the right.

    Args:
      columns: their names.
      rows: their cells, shown by `str`.
      code: names of the columns that show code.
      styles: `"good"`, `"bad"`, `"note"`, `"quiet"` or `""` for each row.
      kinds: what `checkboxes` hides a row by, for each row.
    """
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    classes = ["code" if name in code else "" for name in columns]
    body = []
    for i, row in enumerate(rows):
        style = styles[i] if styles else ""
        kind = f' data-kind="{html.escape(kinds[i])}"' if kinds else ""
        cells = "".join(map(_cell, row, classes))
        body.append(f'<tr class="{style}"{kind}>{cells}</tr>')
    return (
        f"<table><thead><tr>{head}</tr></thead><tbody>\n"
        + "\n".join(body)
        + "\n</tbody></table>"
    )


def _cell(value: object, css: str) -> str:
    is_number = isinstance(value, (int, float)) or _reads_as_number(str(value))
    return f'<td class="{css or "number" * is_number}">{html.escape(str(value))}</td>'


def _reads_as_number(text: str) -> bool:
    return text[:1].isdigit() and not any(c.isalpha() for c in text.split(" ")[0])
