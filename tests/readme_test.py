"""The README says what is there: commands, files, fields."""

import contextlib
import importlib
import io
import pathlib
import re
import shlex

from absl import flags
from absl.testing import absltest

from aoarm_jax import main
from launch import common

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


class ReadmeTest(absltest.TestCase):
  def test_every_bash_block_is_run_by_ci(self):
    """The headings whose blocks .ci/run runs are the ones that have blocks."""
    sections = re.split(r"^(#+ .*)$", README, flags=re.MULTILINE)
    with_block = [
      heading
      for heading, body in zip(sections[1::2], sections[2::2])
      if "```bash" in body
    ]
    run = re.findall(
      r'readme_commands "(## [^"]*)"', (ROOT / ".ci/run").read_text()
    )
    self.assertNotEmpty(with_block)
    self.assertEqual(set(with_block), set(run))

  def test_every_file_of_the_package_is_in_the_file_map(self):
    file_map = README.split("## File map")[1].split("\n## ")[0]
    named = set()
    for row in re.findall(r"^\| (`[^|]*) \|", file_map, flags=re.MULTILINE):
      first, *others = re.findall(r"`([^`]*)`", row)
      beside = first.rpartition("/")[0]
      named |= {first}
      named |= {s if "/" in s else f"{beside}/{s}" for s in others}
    for name in named:
      self.assertTrue((ROOT / name).exists(), name)
    for path in (ROOT / "aoarm_jax").rglob("*.py"):
      name = path.relative_to(ROOT)
      if name.name != "__init__.py":
        self.assertNotEmpty({f"{name}", f"{name.parent}/"} & named, name)

  def test_the_planning_table_is_that_of_docs_pods(self):
    def table(text):
      lines = [s for s in text.splitlines() if s.startswith("| ")]
      return [[c.strip() for c in s.strip("|").split("|")] for s in lines]

    pods = {
      (name, T, topology): (int(T) * int(batch) // int(chips), memory, step)
      for name, T, topology, chips, batch, _, memory, _, _, step, _ in table(
        (ROOT / "docs/pods.md").read_text()
      )[1:]
    }
    text = README.split("**compiled and not run**:")[1].split("\n\n")[1]
    heading, *lines = table(text)
    self.assertNotEmpty(lines)
    for name, T, tokens, *cells in lines:
      for slice_, cell in zip(heading[3:], cells):
        if not cell:
          continue
        with self.subTest(name, T=T, slice=slice_):
          a_chip, memory, step = pods[name, T, slice_.split(",")[0]]
          self.assertEqual(f"{a_chip:,}", tokens)
          self.assertStartsWith(memory, cell.split()[0].replace("does", "ref"))
          if cell != "does not fit":
            self.assertEqual(step, cell.split(", ")[1])

  def test_every_link_leads_somewhere(self):
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
      self.assertTrue((ROOT / target).exists(), target)

  def test_every_command_and_override_parses(self):
    commands = re.findall(r"python -m aoarm_jax\.main ([^\n`]*)", README)
    overrides = re.findall(r"`(--config\.[^`=]*=[^`]*)`", README)
    for text in commands + [
      f"--config=configs/causal.py {o}" for o in overrides
    ]:
      argv = ["main", *re.sub(r' ?--(prompt|text)="[^"]*"', "", text).split()]
      argv = [re.sub("^--config=", f"--config={ROOT}/", a) for a in argv]
      with self.subTest(text):
        flag_values = flags.FlagValues()
        main.define_flags(flag_values, argv)
        main.parse(argv, flag_values)

  def test_every_launcher_takes_its_command(self):
    commands = re.findall(r"python -m launch\.(\w+) ([^\n`]*)", README)
    self.assertNotEmpty(commands)
    for name, text in commands:
      module = importlib.import_module(f"launch.{name}")
      with self.subTest(name), contextlib.redirect_stdout(io.StringIO()):
        code = common.main(
          module.make_parser, module.start, ["--dry-run", *shlex.split(text)]
        )
        self.assertEqual(code, 0)


if __name__ == "__main__":
  absltest.main()
