"""Tables of text, for a terminal and for Markdown."""

from collections.abc import Iterable, Sequence


def text_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Sets a table in columns; those that hold numbers only are set to the right.

    Args:
      columns: their names.
      rows: their cells, shown by `str`.
    """
    body = [[str(cell) for cell in row] for row in rows]
    widths, right = _layout(columns, body)
    return "\n".join(
        "  ".join(map(_justify, row, widths, right)).rstrip()
        for row in [list(columns), *body]
    )


def shortened_table(
    columns: Sequence[str], rows: Sequence[Sequence[object]], shown: int
) -> str:
    """The first rows as `text_table`, and where the others are.

    Args:
      columns: their names.
      rows: their cells, of a `Result`.
      shown: how many rows to print.
    """
    table = text_table(columns, rows[:shown])
    if len(rows) <= shown:
        return table
    return f"{table}\n... and {len(rows) - shown} more: to_rows(), to_html(path)"


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """As `text_table`, for Markdown.

    Args:
      columns: their names.
      rows: their cells, shown by `str`.
    """
    body = [[str(cell).replace("|", r"\|") for cell in row] for row in rows]
    widths, right = _layout(columns, body)
    rule = [
        "-" * (width - is_right) + ":" * is_right
        for width, is_right in zip(widths, right, strict=True)
    ]
    return "\n".join(
        f"| {' | '.join(map(_justify, row, widths, right))} |"
        for row in [list(columns), rule, *body]
    )


def _layout(
    columns: Sequence[str], body: Sequence[Sequence[str]]
) -> tuple[list[int], list[bool]]:
    cells = [[row[i] for row in body] for i in range(len(columns))]
    widths = [
        max(map(len, (name, *column)))
        for name, column in zip(columns, cells, strict=True)
    ]
    return widths, [bool(c) and all(map(_is_number, c)) for c in cells]


def _is_number(cell: str) -> bool:
    return not cell or cell.lstrip("+-~<")[:1].isdigit() or cell in ("-", "nan", "inf")


def _justify(cell: str, width: int, is_right: bool) -> str:
    return cell.rjust(width) if is_right else cell.ljust(width)
