"""A trained run from Python and from the command line; the README's code."""

import contextlib
import io
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from unittest import mock

import helpers
import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import absltest, parameterized

import aoarm_jax
from aoarm_jax.config import errors
from aoarm_jax.config import schema as config
from aoarm_jax.data import tokenizers
from aoarm_jax.evaluation import score as score_lib
from aoarm_jax.generation import prompts
from aoarm_jax.generation import texts as generate
from aoarm_jax.tools import strip

pytestmark = pytest.mark.once

_contexts = contextlib.ExitStack()
_folder: pathlib.Path
_model = None


def setUpModule():
  """One run, whose model no config file has."""
  global _folder, _model
  if jax.default_backend() != "cpu":
    raise absltest.SkipTest("for the CPU: start with JAX_PLATFORMS=cpu")
  _contexts.enter_context(helpers.quick_compilation())
  _folder = pathlib.Path(_contexts.enter_context(tempfile.TemporaryDirectory()))
  helpers.write_text(_folder / "text")
  helpers.run(
    helpers.arguments(
      _folder / "run",
      {
        "model.T": 40,
        "data.path": _folder / "text",
        "train.steps": 2,
        "eval.batches": 1,
        "sample.count": 1,
      },
    )
  )
  _model = aoarm_jax.load(_folder / "run")


def tearDownModule():
  _contexts.close()


def _run(*command):
  """What a command prints; its config's model is not the run's."""
  out = io.StringIO()
  with contextlib.redirect_stdout(out):
    helpers.run(
      [f"--config={helpers.TINY}", f"--workdir={_folder / 'run'}", *command]
    )
  return out.getvalue().splitlines()


def _printed_by(page):
  """The lines that the Python code of a page prints, with the run of here."""
  text = (helpers.ROOT / page).read_text()
  code = "".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
  shown = '"runs/two_stream-tiny"'
  assert code.count(shown) == 1, page
  out = io.StringIO()
  with contextlib.redirect_stdout(out):
    exec(code.replace(shown, repr(str(_folder / "run"))), {})
  return out.getvalue().splitlines()


class ModelTest(parameterized.TestCase):
  def test_import_is_cheap(self):
    code = (
      "import aoarm_jax, sys; "
      "sys.exit(bool({'jax', 'numpy', 'flax'} & {*sys.modules}))"
    )
    subprocess.run(
      [sys.executable, "-c", code], check=True, env=helpers.environment()
    )

  def test_the_documentation_runs(self):
    lines = _printed_by("README.md")
    self.assertLen(lines, 3 + 4 + 1)
    for line in lines[3:7]:
      self.assertRegex(line, r"^she said noth... to her moth.. -\d")
    lines = _printed_by("docs/python.md")
    self.assertLen(lines, 2 + 1)
    drawn, blanks, everything = map(float, lines[-1].split())
    self.assertAlmostEqual(drawn, blanks, delta=1e-3)
    self.assertLess(everything, blanks - 1)

  def test_what_was_trained(self):
    self.assertEqual((_model.step, _model.config.model.T), (2, 40))

  def test_texts_depend_on_seed_and_index_alone(self):
    """Many in one call, whatever the batches; a short last one too."""
    few = _model.generate(3, batch_size=8)
    many = _model.generate(20, batch_size=8)
    for got in (few, _model.generate(20, batch_size=3)):
      for text, want in zip(got, many):
        self.assertEqual(text[:2], want[:2])
        self.assertAlmostEqual(text.log_p, want.log_p, delta=1e-3)
    self.assertLen({text.text for text in many}, 20)
    other = _model.generate(3, seed=1)
    self.assertNotEqual(other[0].text, few[0].text)

  def test_few_numbers_of_texts_compile(self):
    """Rows fill up to a power of two; config.*.batch_size is the most."""
    texts = ["ab", "[b]c", "cd", "d", "ef"]
    scorer, sampler = _model._scorer._jitted, _model._sampler._jitted
    want = _model.score(texts, batch_size=6)
    _model.generate(5, temperature=0.7)
    before = scorer._cache_size(), sampler._cache_size()
    for count in (5, 6, 7, 8):
      _model.generate(count, temperature=0.7)
    got = _model.score([*texts, "g"], batch_size=6)
    after = scorer._cache_size(), sampler._cache_size()
    self.assertEqual(after, before)
    for a, b in zip(got, want):
      self.assertEqual((a.text, a.order), (b.text, b.order))
      self.assertAlmostEqual(a.log_p, b.log_p, delta=1e-4)

  def test_prompts_of_several_lengths(self):
    """Each as if it stood alone at its index."""
    texts = ["ab__", "a_c" * 10, "______"]
    found = _model.infill(texts, count=3)
    for text, samples in zip(texts, found):
      self.assertLen({sample.text for sample in samples}, 3)
      for sample in samples:
        self.assertRegex(sample.text, f"^{text.replace('_', '[a-z ]')}$")
        self.assertEqual(sorted(sample.order), list(range(1, len(text) + 1)))
    self.assertEqual(_model.infill(texts[0], count=3), found[0])

  def test_another_blank(self):
    want, got = _model.score("a[b]_"), _model.score("a[b]?", blank="?")
    self.assertEqual(got[1:], want[1:])
    want, got = _model.infill("_b"), _model.infill("?b", blank="?")
    self.assertEqual(got, want)

  def test_a_run_of_another_machine(self):
    """Its kernel is not here; nor is it asked for."""
    folder = _folder / "elsewhere"
    shutil.copytree(_folder / "run", folder)
    written = json.loads((folder / "config.json").read_text())
    written["compute"] |= {"attention": "mosaic_gpu", "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(written))
    model = aoarm_jax.load(folder)
    self.assertEqual(model.config.compute.attention, "auto")
    self.assertLess(model.score("abc").log_p, 0)
    self.assertLess(model.infill("a_c")[0].log_p, 0)

  def test_a_generated_text_scores_as_it_was_drawn(self):
    """All its tokens, each text in its own order, by one program."""
    texts = _model.generate(3, seed=5)
    _model.score(texts, order=[text.order for text in texts])
    before = _model._scorer._jitted._cache_size()
    for orders in ([x.order for x in texts], [x.order[::-1] for x in texts]):
      scores = _model.score(texts, order=orders)
      for text, score, order in zip(texts, scores, orders):
        self.assertEqual(score.order, order)
        self.assertEqual(score.text, text.text)
        if order == text.order:
          self.assertAlmostEqual(score.log_p, text.log_p, delta=1e-3)
    self.assertEqual(_model._scorer._jitted._cache_size(), before)
    one = _model.score(texts[0], order=np.array(texts[0].order))
    self.assertAlmostEqual(one.log_p, texts[0].log_p, delta=1e-3)

  def test_numbers_of_numpy(self):
    for temperature in (np.float64(0.5), np.float32(0.5)):
      (text,) = _model.generate(np.int64(1), temperature=temperature)
    self.assertLen(text.text, 40)

  @parameterized.parameters("parallel", "speculative", "adaptive")
  def test_methods_and_given_orders(self, method):
    (text,) = _model.infill("_b__", method=method, order=[4, 3, 2, 1])
    self.assertEqual(text.order[0], 2)
    if method != "adaptive":
      self.assertEqual(text.order, [2, 4, 3, 1])

  @parameterized.parameters(
    (lambda m: m.infill("abc"), "text 1='abc' has no blank '_'"),
    (lambda m: m.infill(["a_", "_X"]), "text 2: char27: character 'X' at off"),
    (lambda m: m.infill("_" * 41), "text 1 has 41 tokens; the model generates"),
    (lambda m: m.score("a" * 41), "text 1 has 41 tokens; the model knows at m"),
    (lambda m: m.score(["a", "[]"]), r"text 2='\[\]': there is nothing to sc"),
    (
      lambda m: m.score("ab", order=[1, 1]),
      r"order: must be a permutation of 1\.\.2, and 1 is not in it once",
    ),
    (lambda m: m.score("abc", order=range(3)), "order: .*, and 0 is not in it"),
    (lambda m: m.score("ab", order=[1.5, 2]), r"order=\[1.5, 2\]: must be "),
    (lambda m: m.score("ab", order=None), "order=None: must be a name or a li"),
    (lambda m: m.score("ab", order=["a", "b"]), r"order=\['a', 'b'\]: must be"),
    (lambda m: m.score(["a", "b"], order=[[1]]), "order: 1 orders for 2 texts"),
    (lambda m: m.generate(order=[]), "order: has 0 positions, and a generated"),
    (
      lambda m: m.score("abcde", order=[2, 1]),
      "order: has 2 positions, and te"
      "xt 1 has 5 tokens; it must be a permutation of all of them",
    ),
    (
      lambda m: m.infill(["a_", "_bc"], order=[2, 1]),
      "order: has 2 positions, and text 2 has 3 tokens",
    ),
    (
      lambda m: m.generate(order=[1]),
      "order: has 1 positions, and a generated text has 40 tokens",
    ),
    (lambda m: m.score("ab", orders=4), "orders=4: counts with order='unifor"),
    (lambda m: m.score(3), "3 is no text: give a str or a list of them"),
    (lambda m: m.score(["a", None]), "None is no text"),
    (lambda m: m.infill(b"a_"), "b'a_' is no text"),
    (lambda m: m.score("a?", blank="??"), r"config.sample.blank='\?\?': must"),
    (lambda m: m.infill("a?", blank=""), "config.sample.blank='': name the ch"),
    (lambda m: m.generate(heat=1.0), "heat: no such option; there are: count"),
    (lambda m: m.generate(0), "config.sample.count=0: must be at least 1"),
    (lambda m: m.generate(method="x"), "config.sample.method='x': 'x' is not"),
  )
  def test_what_cannot_be(self, call, message):
    errors = (prompts.PromptError, config.ConfigError)
    with self.assertRaisesRegex(errors, f"^{message}") as caught:
      call(_model)
    self.assertLen(str(caught.exception).splitlines(), 1)

  def test_no_run(self):
    with self.assertRaisesRegex(
      Exception, "absent/config.json: no such file; .* not the directory"
    ):
      aoarm_jax.load(_folder / "absent")


class CommandTest(parameterized.TestCase):
  def test_the_model_is_the_run_s(self):
    """Its T of 40 is in config.json; that of the config file is 64."""
    (line,) = _run("--mode=sample", "--config.sample.count=1")
    self.assertLen(line, 40)
    _run(
      "--mode=eval",
      "--config.eval.batches=1",
      f"--config.data.path={_folder / 'text'}",
    )
    with self.assertRaisesRegex(
      config.ConfigError, "config.model.T=50: the checkpoint in .* has 40"
    ):
      _run("--mode=sample", "--config.model.T=50")

  def test_prompts_of_a_file(self):
    path = _folder / "prompts.txt"
    path.write_text("ab__\nc_\n")
    lines = [
      json.loads(line)
      for line in _run(
        "--mode=sample", f"--input={path}", "--config.sample.count=2"
      )
    ]
    self.assertEqual([x["prompt"] for x in lines], ["ab__"] * 2 + ["c_"] * 2)
    for line in lines:
      self.assertLess(line["log_p"], 0)
    self.assertEqual(lines[0]["text"], _model.infill("ab__", 2)[0].text)

  def test_a_file_is_printed_by_parts(self):
    """The same texts; what was done before a stop is there."""
    path = _folder / "many.txt"
    path.write_text("ab__\nc_\n_d\n_\n")
    command = "--mode=sample", f"--input={path}", "--config.sample.count=2"
    whole = _run(*command)
    with mock.patch.object(generate, "_AT_ONCE", 3):
      self.assertEqual(_run(*command), whole)
    fill, calls = generate.Sampler.fill, []

    def stopped(*arguments, **options):
      calls.append(1)
      if len(calls) > 1:
        raise KeyboardInterrupt
      return fill(*arguments, **options)

    out = io.StringIO()
    with (
      mock.patch.object(generate, "_AT_ONCE", 2),
      mock.patch.object(generate.Sampler, "fill", stopped),
      contextlib.redirect_stdout(out),
      self.assertRaises(KeyboardInterrupt),
    ):
      helpers.run(
        [f"--config={helpers.TINY}", f"--workdir={_folder / 'run'}", *command]
      )
    self.assertEqual(out.getvalue().splitlines(), whole[:2])

  def test_lines_of_a_file(self):
    """As editors of all systems write them; a form feed is no line's end."""
    path = _folder / "lines.txt"
    path.write_bytes(b"\xef\xbb\xbfa_\r\nb\x0c_\r\n\r\n_\n\n\n")
    with self.assertLogs("absl", "WARNING") as logs:
      names, lines = zip(*prompts.read_lines(str(path)))
    self.assertEqual(lines, ("a_", "b\x0c_", "_"))
    self.assertEqual(names[-1], f"{path}, line 4")
    (line,) = logs.output
    self.assertIn("empty lines left out: 1, the first is line 3", line)
    path.write_text("a_\n\n")
    with self.assertNoLogs("absl", "WARNING"):
      self.assertLen(prompts.read_lines(str(path)), 1)

  @parameterized.parameters("sample", "score")
  def test_an_empty_line_in_a_file(self, mode):
    """It is left out, and the others are done."""
    path = _folder / "gap.txt"
    path.write_text("abc_\n\n_bc\n")
    lines = _run(f"--mode={mode}", f"--input={path}", "--config.sample.count=1")
    name = "text" if mode == "score" else "prompt"
    self.assertEqual(
      [json.loads(line)[name] for line in lines], ["abc_", "_bc"]
    )

  def test_scores_of_standard_input(self):
    stdin = mock.Mock(buffer=io.BytesIO(b"ab[c]\nabc\n"))
    with mock.patch.object(sys, "stdin", stdin):
      lines = [json.loads(line) for line in _run("--mode=score", "--input=-")]
    want = _model.score(["ab[c]", "abc"])
    self.assertEqual([x["text"] for x in lines], ["ab[c]", "abc"])
    for line, score in zip(lines, want):
      self.assertAlmostEqual(line["log_p"], score.log_p, delta=1e-4)
      self.assertEqual(line["positions"], score.positions)

  def test_ordinary_prose(self):
    """Of prompts and of texts to score, on all ways."""
    want = _model.score("hello [wor]ld")
    got = _model.score("Hello, [Wor]ld!", normalise=True)
    self.assertEqual(got, want)
    (text,) = _model.infill("Hello, W__ld!", normalise=True)
    self.assertRegex(text.text, "^hello w..ld$")
    with self.assertRaisesRegex(prompts.PromptError, "normalise=True"):
      _model.score("Hello, [Wor]ld!")
    normal = "--config.data.normalise=true"
    (line,) = _run("--mode=score", "--text=Hello, [Wor]ld!", normal)
    self.assertAlmostEqual(json.loads(line)["log_p"], want.log_p, delta=1e-4)
    (line,) = _run(
      *("--mode=sample", "--prompt=Hello, W__ld!", normal),
      "--config.sample.count=1",
    )
    self.assertRegex(line, "^hello w..ld$")

  def test_a_run_does_not_ask_for_blanks(self):
    """The saved config of a run that was told of them does not count."""
    saved = _folder / "run" / "config.json"
    read = saved.read_text()
    values = json.loads(read)
    values["sample"]["blank"], values["score"]["marks"] = "b", "ac"
    try:
      saved.write_text(json.dumps(values))
      model = aoarm_jax.load(_folder / "run")
    finally:
      saved.write_text(read)
    self.assertEqual(model.config.sample.blank, "auto")
    self.assertEqual(model.config.score.marks, "auto")

  def test_a_strip_of_bytes_has_a_symbol_a_token(self):
    byte = tokenizers.get("byte")
    tokens = "é\n a".encode()
    self.assertEqual(
      [strip._symbol(byte, token) for token in tokens],
      [*"\ufffd\ufffd\ufffd a"],
    )

  def test_a_strip(self):
    path = _folder / "strip.png"
    with contextlib.redirect_stdout(io.StringIO()):
      strip.main([f"--workdir={_folder / 'run'}", f"--out={path}"])
    self.assertStartsWith(path.read_bytes(), b"\x89PNG")
    with self.assertRaisesRegex(SystemExit, "absent/config.json: no such file"):
      strip.main([f"--workdir={_folder / 'absent'}", f"--out={path}"])

  def test_the_score_of_a_text(self):
    (line,) = _run(
      "--mode=score", "--text=a[b]c", "--config.score.order=uniform"
    )
    self.assertLen(json.loads(line)["order_log_p"], 8)

  @parameterized.parameters(
    (("score",), "--mode=score needs --text="),
    (("score", "--text=a", "--input=-"), "--input goes without --prompt"),
    (("sample", "--text=a"), "--text needs --mode=score"),
    (("eval", "--input=-"), "--input needs --mode=sample or --mode=score"),
    (("score", "--input=/absent"), "--input=/absent: no such file"),
    (("score", "--input=/"), "--input=/: is a folder, not a file"),
    (("sample", "--prompt="), "--prompt is empty"),
    (("score", "--text=a[b"), "--text: '.' at offset 1 has no partner"),
    (("score", "--text=aXb"), "--text: char27: character 'X' at offset 1"),
    (("score", "--text=a", "--config.score.marks=["), "config.score.marks='.'"),
    (("sample", "--input={bad}"), "{bad}, line 2='cd' has no blank '_'"),
    (
      ("score", "--input={long}"),
      "{long}, line 4 has 41 tokens; .* .2 others are wrong too; the next is "
      "{long}, line 5",
    ),
    (
      ("sample", "--input={long}"),
      "{long}, line 1='ab' has no blank '_': .* .4 others are wrong",
    ),
    (("score", "--input={utf16}"), "{utf16}: is not text: it is UTF-16 text"),
    (("score", "--input={none}"), "{none} is empty: one text a line"),
  )
  def test_commands_that_cannot_be(self, command, message):
    names = ("bad", "none", "utf16", "long")
    files = {name: str(_folder / name) for name in names}
    (_folder / "utf16").write_text("ab\ncd\n", encoding="utf-16")
    (_folder / "bad").write_text("a_\ncd\n")
    (_folder / "none").write_text("")
    (_folder / "long").write_text(f"ab\nc_\nab\n{'d' * 41}\na[b\naXb\n")
    mode, *rest = (part.format(**files) for part in command)
    out = io.StringIO()
    with (
      self.assertRaisesRegex(Exception, message.format(**files)) as caught,
      mock.patch.object(score_lib, "_AT_ONCE", 2),
      mock.patch.object(generate, "_AT_ONCE", 2),
      contextlib.redirect_stdout(out),
    ):
      command = [f"--config={helpers.TINY}", f"--workdir={_folder / 'run'}"]
      helpers.run([*command, f"--mode={mode}", *rest])
    self.assertEqual(out.getvalue(), "")
    self.assertLen(str(caught.exception).splitlines(), 1)
    self.assertIsInstance(caught.exception, (errors.UserError, flags.Error))


if __name__ == "__main__":
  absltest.main()
