"""How the tables of measured speeds are filled."""

import contextlib
import csv
import io
import json
import tempfile

import jax
from absl.testing import absltest
from etils import epath

import pallas_kernels
from aoarm_jax.config import schema as config_lib
from aoarm_jax.tools import table


class TableTest(absltest.TestCase):
  def test_a_program_that_does_not_compile(self):
    """The others are compiled; its error comes where it is asked for."""

    def refuse():
      raise config_lib.ConfigError("no")

    with contextlib.redirect_stderr(io.StringIO()) as err:
      found = table.compile_all({"a": lambda: 1, "b": refuse})
    self.assertEqual(found["a"].result(), 1)
    with self.assertRaisesRegex(config_lib.ConfigError, "no"):
      found["b"].result()
    self.assertRegex(err.getvalue(), r"^2 of 2 programs compiled, \d+ s\n$")

  def test_rows_that_fail(self):
    """They say why; an error of another kind ends the table."""
    errors = {
      2: config_lib.ConfigError("config: refused"),
      3: pallas_kernels.UnsupportedError("attention: no such device"),
      4: jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 bytes"),
      5: jax.errors.JaxRuntimeError("INTERNAL: another"),
    }

    def measure(row):
      if row in errors:
        raise errors[row]
      return 10 * row

    self.assertEqual(
      list(table.measured([2, 1, 3, 4], measure)),
      [
        (2, None, "config: refused"),
        (1, 10, ""),
        (3, None, "attention: no such device"),
        (4, None, "out of device memory"),
      ],
    )
    with self.assertRaisesRegex(jax.errors.JaxRuntimeError, "another"):
      list(table.measured([5], measure))

  def test_files(self):
    folder = epath.Path(self.enterContext(tempfile.TemporaryDirectory()))
    rows = [dict(T=8, speed=0.1), dict(T=16, speed=0.25)]
    table.write_csv(folder / "x.csv", [])
    table.write_csv(folder / "x.csv", rows)
    for row in rows:
      table.append_json(folder / "new" / "x.json", row)
    lines = (folder / "new" / "x.json").read_text().splitlines()
    self.assertEqual([json.loads(line) for line in lines], rows)
    with (folder / "x.csv").open() as file:
      self.assertEqual(
        [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)],
        rows,
      )

  def test_a_file_that_cannot_be_written_does_not_end_the_table(self):
    folder = epath.Path(self.enterContext(tempfile.TemporaryDirectory()))
    (folder / "file").write_text("")
    path = folder / "file" / "x"
    with self.assertLogs(level="WARNING"):
      self.assertFalse(table.write_csv(path, [dict(T=8)]))
      self.assertFalse(table.append_json(path, dict(T=8)))
    self.assertTrue(table.write_csv(folder / "x", [dict(T=8)]))


if __name__ == "__main__":
  absltest.main()
