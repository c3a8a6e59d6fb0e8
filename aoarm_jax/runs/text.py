"""Plain text for people: tables, pages, numbers, errors on one line."""

import csv
import io
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


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


def csv_table(rows: Iterable[Mapping[str, Any]], digits: int = 0) -> str:
  """Returns a table as CSV, with a newline at the end of each row.

  Args:
    rows: of {title of a column: cell}. The table has the columns of all rows,
      and a cell that a row lacks is empty.
    digits: the most digits of a float, as in "%g". 0 keeps all of them.
  """
  rows = list(rows)
  head = list(dict.fromkeys(title for row in rows for title in row))
  content = io.StringIO(newline="")
  writer = csv.writer(content, lineterminator="\n")
  writer.writerow(head)
  for row in rows:
    cells = (row.get(title, "") for title in head)
    writer.writerow(
      f"{x:.{digits}g}" if digits and isinstance(x, float) else x for x in cells
    )
  return content.getvalue()


def filled(page: str, width: int = 92) -> str:
  """Returns a page of Markdown whose paragraphs and lists have short lines.

  Headings, tables and pictures stay as they are.

  Args:
    page: parts with an empty line between them. In a list, every line that
      begins with a dash begins an item.
    width: characters of a line. A longer word is not cut.
  """
  wrapper = textwrap.TextWrapper(
    width, break_long_words=False, break_on_hyphens=False
  )
  parts = page.strip().split("\n\n")
  for i, part in enumerate(parts):
    items = re.split(r"\n(?=- )", part)
    mark = re.match(r"(- |\d+\. )?", part)
    wrapper.subsequent_indent = " " * len(mark[0] if mark else "")
    if not part.startswith(("|", "#", "!")):
      parts[i] = "\n".join(map(wrapper.fill, items))
  return "\n\n".join(parts) + "\n"


def amount(count: float) -> str:
  """Returns a number in words where it is large, such as "1.05 billion"."""
  if count >= 1e9:
    return f"{count / 1e9:.2f} billion"
  return f"{count / 1e6:.0f} million" if count >= 1e6 else f"{count:,.0f}"


def counted(count: int, noun: str) -> str:
  """Returns "1 seed" or "3 seeds"."""
  return f"{count:,} {noun}{'s' * (count != 1)}"


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
