"""Plain text for people: aligned tables, errors on one line."""

from collections.abc import Sequence


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
