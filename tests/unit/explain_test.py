"""What --help and --mode=config say about the fields."""

import dataclasses

from absl.testing import absltest

from aoarm_jax.config import explain
from aoarm_jax.config import schema as config_lib


class ExplainTest(absltest.TestCase):
  def test_every_field_is_there_with_all_that_is_known(self):
    config = config_lib.Config().replace("model.D", 96)
    table = explain.table(config)
    words = " ".join(table.split())
    for path, field, value in config_lib.leaves(config_lib.Config()):
      with self.subTest(path):
        self.assertIn(f"  --{path}=", table)
        self.assertIn(" ".join(field.metadata["doc"].split()), words)
        about = table.partition(f"  --{path}=")[2].partition("\n  --")[0]
        self.assertIn(config_lib.KINDS[type(value)], " ".join(about.split()))
        self.assertIn("default", about)
        for choice in field.metadata["choices"] or ():
          self.assertIn(choice, about)
    self.assertIn(
      "  --config.model.D=96\n      width of the model\n      "
      "a whole number (int), ≥ 2, default 256, a checkpoint is bound to it\n",
      table,
    )
    self.assertIn("\n\nmodel: The backbone and its mechanism", table)

  def test_values_are_written_as_the_command_line_takes_them(self):
    config = config_lib.Config().replace("data.path", "my books")
    config = config.replace("orders.given", (2, 1))
    table = explain.table(config)
    self.assertIn("--config.data.path='my books'\n", table)
    self.assertIn('--config.orders.given="(2, 1)"\n', table)
    self.assertIn("--config.compute.remat=false\n", table)
    self.assertIn("--config.sample.blank=auto\n", table)

  def test_limits(self):
    limits = {
      path: explain.limits(field)
      for path, field, _ in config_lib.leaves(config_lib.Config())
    }
    self.assertEqual(limits["config.optimizer.b1"], ["≥ 0", "< 1"])
    self.assertEqual(limits["config.sample.top_p"], ["> 0", "≤ 1"])
    self.assertEqual(limits["config.data.path"], [])

  def test_lines_fit_a_terminal(self):
    lines = explain.table(config_lib.Config()).splitlines()
    self.assertLess(max(map(len, lines)), 90)

  def test_an_unknown_field_of_the_model_explains_the_letters(self):
    error = str(
      config_lib.no_such_field("config.model", "depth", config_lib.Model)
    )
    self.assertStartsWith(error, "config.model.depth: no such field; ")
    for field in dataclasses.fields(config_lib.Model):
      self.assertIn(field.name, error)
    self.assertIn("L (number of layers)", error)
    self.assertIn("--mode=config", error)
    self.assertLen(error.splitlines(), 1)


if __name__ == "__main__":
  absltest.main()
