"""README and the page on the study say what the report says."""

import csv

import helpers
from absl.testing import absltest

from aoarm_jax.runs import text as text_lib

DOCS = helpers.ROOT / "docs"
PAGES = {
  name: (helpers.ROOT / name).read_text()
  for name in ("README.md", "docs/studies.md")
}


def words(text):
  return " ".join(text.split())


class PublishedTest(absltest.TestCase):
  def test_the_readme_has_the_three_sentences(self):
    report = (DOCS / "study" / "README.md").read_text()
    part = report.split("## Three sentences")[1].split("Comparisons:")[0]
    items = [words(item) for item in part.strip().split("\n\n")]
    self.assertLen(items, 3)
    for item in items:
      self.assertIn(item, words(PAGES["README.md"]))

  def test_tables_have_the_differences_at_equal_flops(self):
    """README has the largest budget of each length, and the page has all."""
    text = (DOCS / "study" / "differences.csv").read_text()
    lines, largest = [], {}
    for row in csv.DictReader(text.splitlines()):
      if (row["study"], row["arm"], row["equal"]) == (
        "study_budget",
        "decoupled_rope",
        "flops",
      ):
        bits = {name: float(row[name]) for name in row if "bits" in name}
        half = float(row["half_of_95_percent"])
        lines.append(
          f"| {text_lib.amount(int(row['characters']))} | {int(row['T']):,} "
          f"| {row['seeds']} | {bits['reference_bits']:.3f} "
          f"| {bits['arm_bits']:.3f} | {bits['difference_bits']:+.3f} ± "
          f"{half:.3f} | {row['answer']} |"
        )
        largest[row["T"]] = lines[-1]  # Budgets ascend.
    self.assertNotEmpty(lines)
    for (name, page), wanted in zip(
      PAGES.items(), ([*largest.values()], lines)
    ):
      with self.subTest(page=name):
        table = page.partition("| characters | T | seeds |")[2]
        shown = table.partition("\n\n")[0].splitlines()[2:]
        self.assertEqual(shown, wanted)

  def test_knockouts_of_the_page_are_those_of_the_table(self):
    text = (DOCS / "study" / "knockouts.csv").read_text()
    cells = {
      f"{float(row['late_bits']):.3f} ± {float(row['late_bits_error']):.3f}"
      for row in csv.DictReader(text.splitlines())
      if row["layer"] == "all"
    }
    tables = PAGES["docs/studies.md"].split("| barred slots |")[1:]
    self.assertLen(tables, 2)
    for table in tables:
      rows = table.partition("\n\n")[0].splitlines()[2:]
      self.assertNotEmpty(rows)
      for row in rows:
        self.assertContainsSubset(row.strip("| ").split(" | ")[1:], cells)


if __name__ == "__main__":
  absltest.main()
