"""Plain text for people: aligned tables, errors on one line."""

from collections.abc import Iterable, Sequence


def padded(cells: Sequence[str], widths: Sequence[int], sides: str) -> str:
  """Returns one line of a table.

  Args:
    cells: one per column.
    widths: of the columns, in characters. A longer cell is not cut.
    sides: "<" or ">" for each column: whether its cells stand left or right.
  """
  return "  ".join(map(format, cells, map("{}{}".format, sides, widths)))


def aligned(rows: Sequence[Sequence[str]], sides: str) -> str:
  """Returns a table whose columns are as wide as their longest cells.

  Args:
    rows: of cells, the titles among them.
    sides: as in `padded`.
  """
  widths = [max(map(len, column)) for column in zip(*rows)]
  return "".join(f"{padded(row, widths, sides)}\n" for row in rows)


def markdown_table(
  head: Sequence[object], rows: Iterable[Iterable[object]], sides: str = ""
) -> str:
  """Returns a table of Markdown, without a newline at its end.

  Args:
    head: the titles of the columns.
    rows: the cells of every row. Bars in them are escaped.
    sides: "<" or ">" for each column: whether its cells stand left or right. ""
      leaves them at the left.
  """
  rule = ["---:" if side == ">" else "---" for side in sides or "<" * len(head)]
  return "\n".join(
    f"| {' | '.join(str(cell).replace('|', '&#124;') for cell in line)} |"
    for line in (head, rule, *rows)
  )


def first_line(error: object) -> str:
  """Returns the first line of an error's message, or its type without one."""
  return (str(error).strip() or type(error).__name__).splitlines()[0]


def printable(text: str) -> str:
  """Returns a text on one line, with its control characters escaped.

  A byte model can generate any character. A terminal would obey some of them.

  Args:
    text: any text. A backslash in it stays a single backslash.
  """
  return "".join(
    c if c.isprintable() else c.encode("unicode_escape").decode() for c in text
  )
