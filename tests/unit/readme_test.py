"""The README and the pages show what is there: commands, files, fields.

The report that the program wrote by itself (docs/study/) and the changelog are
read for their commands and links only.
"""

import argparse
import configparser
import contextlib
import dataclasses
import importlib
import importlib.util
import io
import pathlib
import re
import runpy
import shlex
import sys
import tomllib
import warnings
from unittest import mock

import conftest
import imports_test
from absl import app, flags
from absl.testing import absltest, parameterized

from aoarm_jax import command_line, main
from aoarm_jax.config import rules as config_rules
from aoarm_jax.config import schema as config_lib
from launch import common

ROOT = pathlib.Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
LINKED = {
  path.relative_to(ROOT).as_posix(): path.read_text()
  for path in sorted(
    [
      *ROOT.glob("*.md"),
      *(ROOT / "docs").rglob("*.md"),
      ROOT / "aoarm_jax/data/books/README.md",
    ]
  )
}
PAGES = {
  name: text
  for name, text in LINKED.items()
  if not name.startswith(("docs/study/", "CHANGELOG"))
}
# Modules that need an extra. tests/runs/lm_eval_test.py runs the command.
_OF_EXTRAS = ("aoarm_jax.benchmark.lm_eval",)
_ENDINGS = ("py", "txt", "json", "safetensors")  # Of files, and no fields.
SECTIONS = {
  field.name: field for field in dataclasses.fields(config_lib.Config)
}


class Parsed(Exception):
  """A program has read its command line and would start its work now."""


def blocks(text: str) -> list[tuple[str, str]]:
  """(language, content) of every fenced block."""
  return re.findall(r"^ *```(\w*)\n(.*?)^ *```$", text, re.DOTALL | re.M)


def spans(text: str) -> list[str]:
  """Inline code outside of fenced blocks, each on one line."""
  text = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.DOTALL | re.MULTILINE)
  return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def commands(text: str, program: str) -> list[list[str]]:
  """The words of every command line that starts with `program`."""
  lines = spans(text)
  for language, content in blocks(text):
    entered = content.replace("\\\n", " ").splitlines()
    if language == "console":  # The other lines are output.
      entered = [x.removeprefix("$ ") for x in entered if x.startswith("$ ")]
    if language != "python":
      lines += map(str.strip, entered)
  return [shlex.split(x) for x in lines if x.startswith(f"{program} ")]


def every_command(program: str) -> list[tuple[str, list[str]]]:
  """(page, words) of every command line, each once."""
  seen = {}
  for name, text in LINKED.items():
    for words in commands(text, program):
      seen.setdefault(tuple(words), name)
  return [(name, list(words)) for words, name in seen.items()]


def check(words: list[str]) -> None:
  """Parses `python -m module ...` as the module does; nothing else is run.

  Raises:
    AssertionError: the module does not exist or refuses its arguments.
  """
  assert words[:2] == ["python", "-m"], words
  module, arguments = words[2], words[3:]
  if "--" in arguments:
    split = arguments.index("--")
    check(arguments[split + 1 :])
    arguments = arguments[:split]
  assert importlib.util.find_spec(module), f"there is no module {module}"
  if module == "aoarm_jax.main":
    check_main(arguments)
  elif module == "pytest":
    check_pytest(arguments)
  elif arguments and module not in _OF_EXTRAS:
    check_arguments(module, arguments)


def check_main(arguments: list[str], *, alone: bool = False) -> None:
  """The flags and fields; unless `alone`, whether they fit together too."""
  argv = ["main", *arguments]
  # Converting wrote this file, which is a variant of another experiment.
  argv = [
    re.sub("^--config=runs/.*/adapt.py", "--config=two_stream", a) for a in argv
  ]
  # An experiment by name stays as it is.
  argv = [re.sub("^--config=(?=.*/)", f"--config={ROOT}/", a) for a in argv]
  values = flags.FlagValues()
  command_line.define_flags(values, argv)
  command_line.parse(argv, values)
  if alone:
    return
  config_rules.validate(config_lib.from_config_dict(values.config))
  main._check_flags(values)


def check_pytest(arguments: list[str]) -> None:
  """Files exist, and marks are declared."""
  declared = (ROOT / "pyproject.toml").read_text()
  for before, word in zip(["", *arguments], arguments):
    if before == "-m":
      assert f'"{word}: ' in declared, f"no mark {word}"
    elif word.startswith("tests/"):
      assert (ROOT / word).exists(), f"no file {word}"


def check_arguments(module: str, arguments: list[str]) -> None:
  """Starts the module, and stops it where argparse is done."""
  parse_args = argparse.ArgumentParser.parse_args

  def parse_and_stop(self, args=None, namespace=None):
    parse_args(self, args, namespace)
    raise Parsed

  complaint = io.StringIO()
  with (
    mock.patch.object(argparse.ArgumentParser, "parse_args", parse_and_stop),
    mock.patch.object(app, "run", side_effect=Parsed),
    mock.patch.object(sys, "argv", [module, *arguments]),
    warnings.catch_warnings(),
    contextlib.redirect_stderr(complaint),
  ):
    # The module may have been imported before, which does not matter here.
    warnings.filterwarnings("ignore", ".* found in sys.modules", RuntimeWarning)
    try:
      runpy.run_module(module, run_name="__main__", alter_sys=True)
    except Parsed:
      return
    except SystemExit:
      pass
  raise AssertionError(f"{module} refuses {arguments}: {complaint.getvalue()}")


class CommandsTest(parameterized.TestCase):
  def test_every_bash_block_of_the_readme_is_run_by_ci(self):
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

  def test_both_tiers_are_run_by_ci_and_leave_out_the_other_marks(self):
    """No option of pytest takes the place of another one by mistake."""
    pytest_options = tomllib.loads((ROOT / "pyproject.toml").read_text())[
      "tool"
    ]["pytest"]["ini_options"]
    marks = [line.split(":")[0] for line in pytest_options["markers"]]
    default = shlex.split(pytest_options["addopts"])[-1]
    self.assertEqual(default, " and ".join(f"not {mark}" for mark in marks))
    others = [f"not {mark}" for mark in marks if mark != "thorough"]
    tier = " and ".join(["thorough", *others])
    self.assertEqual(conftest.selection("thorough"), tier)
    both = "default or thorough"
    self.assertEqual(conftest.selection(both), " and ".join(others))
    for expression in (default, "slow", "gpu"):
      self.assertEqual(conftest.selection(expression), expression)
    tiers = {"python -m pytest", "python -m pytest -m thorough"}
    ci = (ROOT / ".ci/run").read_text()
    self.assertIn(f"""test_in "$scratch/oldest" -m "'{both}'"\n""", ci)
    for page in (README, CONTRIBUTING):
      lines = {line for _, block in blocks(page) for line in block.splitlines()}
      self.assertContainsSubset(tiers, {*lines, *spans(page)})

  def test_every_command_parses(self):
    found = every_command("python -m")
    modules = {words[2] for _, words in found}
    self.assertContainsSubset(
      {"aoarm_jax.main", "aoarm_jax.tools.scaling", "launch.local", "pytest"},
      modules,
    )
    for name, words in found:
      with self.subTest(page=name, command=shlex.join(words)):
        check(words)

  def test_every_use_of_the_command_parses(self):
    every = every_command("aoarm_jax")
    self.assertNotEmpty(every)
    for name, words in every:
      with self.subTest(page=name, command=shlex.join(words)):
        check_main(words[1:])

  @parameterized.parameters(
    "python -m aoarm_jax.main --config=absent",
    "python -m aoarm_jax.absent",
    "python -m aoarm_jax.main --config=configs/absent.py",
    "python -m aoarm_jax.main --config=configs/causal.py:absent",
    "python -m aoarm_jax.main --config=configs/causal.py --mode=absent",
    "python -m aoarm_jax.main --config=configs/causal.py --config.model.x=1",
    "python -m aoarm_jax.main --config=configs/causal.py --config.model.T=x",
    "python -m aoarm_jax.main --config=configs/causal.py --config.model.T=0",
    "python -m aoarm_jax.main --config=configs/causal.py --text=x",
    "python -m aoarm_jax.tools.scaling --absent",
    "python -m aoarm_jax.tools.generation_speed --methods absent",
    "python -m launch.local --processes=2 -- python -m aoarm_jax.main --mode=x",
    "python -m pytest -m absent",
    "python -m pytest tests/absent_test.py",
  )
  def test_what_is_wrong_is_seen(self, command):
    with self.assertRaises(Exception):  # noqa: B017
      check(shlex.split(command))

  def test_overrides_and_fields_exist(self):
    for name, text in PAGES.items():
      for span in spans(text):
        if re.match(r"--config\.[^`=]*=", span):
          with self.subTest(page=name, override=span):
            experiment = "--config=configs/two_stream.py"
            check_main([experiment, *shlex.split(span)], alone=True)
        field = re.fullmatch(r"(?:--)?(?:config\.)?(\w+)\.(\w+)", span)
        if field and field[1] in SECTIONS and field[2] not in _ENDINGS:
          section = SECTIONS[field[1]].default
          with self.subTest(page=name, field=span):
            self.assertTrue(hasattr(section, field[2]))

  def test_every_launcher_takes_its_command(self):
    for name, text in PAGES.items():
      if name == "docs/launching.md":
        continue  # tests/runs/launch_test.py compares that page's outputs.
      for words in commands(text, "python -m launch.local"):
        module = importlib.import_module(words[2])
        with (
          self.subTest(page=name, command=shlex.join(words)),
          contextlib.redirect_stdout(io.StringIO()),
        ):
          code = common.main(
            module.make_parser, module.start, ["--dry-run", *words[3:]]
          )
          self.assertEqual(code, 0)

  def test_every_extra_exists(self):
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    for name, words in every_command("pip install"):
      extras = re.findall(r"\.\[(.*)\]", words[-1])
      for extra in extras[0].split(",") if extras else ():
        self.assertIn(extra, setup["options.extras_require"], name)


class PagesTest(parameterized.TestCase):
  def test_the_readme_is_a_door(self):
    self.assertLessEqual(len(README.splitlines()), 150)

  @parameterized.parameters(*LINKED)
  def test_every_link_leads_somewhere(self, name):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", LINKED[name]):
      self.assertTrue((ROOT / name).parent.joinpath(target).exists(), target)

  @parameterized.parameters(*PAGES)
  def test_every_file_that_is_named_exists(self, name):
    folders = "aoarm_jax|pallas_kernels|configs|launch|tests|docs"
    for span in spans(PAGES[name]):
      if re.fullmatch(rf"({folders})/[\w./]*", span):
        self.assertTrue((ROOT / span).exists(), span)

  def test_python_is_run_by_a_test(self):
    """In tests/runs, by the tests of the same subjects."""
    with_code = {
      name
      for name, text in PAGES.items()
      if any(language == "python" for language, _ in blocks(text))
    }
    self.assertEqual(
      with_code,
      {
        *("README.md", "docs/python.md", "docs/pieces.md", "CONTRIBUTING.md"),
        *("docs/exporting.md", "docs/converting.md"),
        "docs/policy_gradients.md",
        *("docs/generation.md", "docs/harness.md"),
      },
    )

  def test_every_folder_is_in_the_file_map(self):
    file_map = CONTRIBUTING.split("## File map")[1].split("\n## ")[0]
    named = set(re.findall(r"^\| `([^`]*)/` \|", file_map, flags=re.MULTILINE))
    folders = {
      path.parent.relative_to(ROOT).as_posix()
      for top in ("aoarm_jax", "pallas_kernels", "configs", "launch", "tests")
      for path in (ROOT / top).rglob("*.py")
    }
    self.assertEqual(named, folders | {"docs"})

  def test_the_arrows_are_those_of_the_test(self):
    (shown,) = re.findall(r"```text\n(launch .*?)```", CONTRIBUTING, re.DOTALL)
    self.assertEqual(tuple(shown.splitlines()), imports_test.FLOORS)

  def test_the_pod_table_stands_once(self):
    with_rows = [
      name for name, text in PAGES.items() if "| v5p:4x4x8 | 128 |" in text
    ]
    self.assertEqual(with_rows, ["docs/pods.md"])


if __name__ == "__main__":
  absltest.main()
