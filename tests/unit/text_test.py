"""Aligned tables, and errors on one line."""

from absl.testing import absltest

from aoarm_jax.runs import text


class TextTest(absltest.TestCase):
  def test_aligned(self):
    table = text.aligned([("name", "count"), ("a", "12,000"), ("", "7")], "<>")
    self.assertEqual(table, "name   count\na     12,000\n           7\n")

  def test_markdown_table(self):
    table = text.markdown_table(("p(x|y)", "n"), [("a | b", 7)], "<>")
    self.assertEqual(
      table, "| p(x&#124;y) | n |\n| --- | ---: |\n| a &#124; b | 7 |"
    )

  def test_csv_table(self):
    rows = [{"a": 1234.5, "b": "x,y"}, {"b": None, "c": 12345}]
    self.assertEqual(text.csv_table(rows), 'a,b,c\n1234.5,"x,y",\n,,12345\n')
    self.assertEqual(
      text.csv_table(rows, digits=2), 'a,b,c\n1.2e+03,"x,y",\n,,12345\n'
    )
    self.assertEqual(text.csv_table([]), "\n")

  def test_filled(self):
    table = f"| {'a ' * 20}|"
    page = f"# {'a ' * 20}\n\n{table}\n\n12. a bb-c\nd e\n\n- abc\nd\n- e\n\n"
    self.assertEqual(
      text.filled(page, 7),
      f"# {'a ' * 20}\n\n{table}\n\n12. a\n    bb-c\n    d e\n\n- abc d\n- e\n",
    )
    self.assertEqual(text.filled("- abcdefg h"), "- abcdefg h\n")
    self.assertEqual(text.filled("- abcdefg h", 10), "- abcdefg\n  h\n")

  def test_amount(self):
    numbers = (0, 999_999, 1e6, 1.048e9)
    words = ["0", "999,999", "1 million", "1.05 billion"]
    self.assertEqual(list(map(text.amount, numbers)), words)

  def test_counted(self):
    words = [text.counted(n, "seed") for n in (0, 1, 2000)]
    self.assertEqual(words, ["0 seeds", "1 seed", "2,000 seeds"])

  def test_a_longer_cell_is_not_cut(self):
    self.assertEqual(
      text.padded(("abc", "1", "x"), (2, 3, 2), "<><"), "abc    1  x "
    )

  def test_first_line(self):
    self.assertEqual(text.first_line(ValueError("\n one\ntwo")), "one")
    self.assertEqual(text.first_line(KeyError()), "KeyError")

  def test_printable(self):
    self.assertEqual(text.printable("a é ☃"), "a é ☃")
    self.assertEqual(
      text.printable("a\x1b[2J\nb\x00\u202e\r"),
      "a\\x1b[2J\\nb\\x00\\u202e\\r",
    )


if __name__ == "__main__":
  absltest.main()
