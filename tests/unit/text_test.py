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
