"""A trained run from Python and from the command line; the README's code."""

import contextlib
import dataclasses
import importlib
import io
import json
import os
import pathlib
import pkgutil
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import warnings
from unittest import mock

import helpers
import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import absltest, parameterized
from jax.experimental.compilation_cache import compilation_cache

import aoarm_jax
from aoarm_jax import api
from aoarm_jax.config import errors
from aoarm_jax.config import schema as config
from aoarm_jax.data import tokenizers
from aoarm_jax.evaluation import score as score_lib
from aoarm_jax.generation import prompts
from aoarm_jax.generation import sample as sample_lib
from aoarm_jax.generation import texts as generate
from aoarm_jax.runs import patience
from aoarm_jax.tools import strip

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


def _subclasses(kind):
  """All classes below a class."""
  for below in kind.__subclasses__():
    yield below
    yield from _subclasses(below)


def _run(*command):
  """What a command prints; its config's model is not the run's."""
  out = io.StringIO()
  with contextlib.redirect_stdout(out):
    helpers.run(
      [f"--config={helpers.TINY}", f"--workdir={_folder / 'run'}", *command]
    )
  return out.getvalue().splitlines()


def _printed_by(page, runs=1):
  """The lines that the Python code of a page prints, with the run of here."""
  text = (helpers.ROOT / page).read_text()
  code = "".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
  shown = '"runs/two_stream-tiny"'
  assert code.count(shown) == runs, page
  out = io.StringIO()
  with contextlib.redirect_stdout(out):
    exec(code.replace(shown, repr(str(_folder / "run"))), {})
  return out.getvalue().splitlines()


class ModelTest(parameterized.TestCase):
  def test_import_is_cheap(self):
    code = (
      "import aoarm_jax, sys; dir(aoarm_jax); aoarm_jax.UserError; "
      "sys.exit(bool({'jax', 'numpy', 'flax'} & {*sys.modules}))"
    )
    subprocess.run(
      [sys.executable, "-c", code], check=True, env=helpers.environment()
    )

  def test_the_documentation_runs(self):
    first, *lines = _printed_by("README.md")
    self.assertRegex(first, r"^it was a [a-z ]{4} and stormy night$")
    self.assertLen(lines, 3 + 4 + 1)
    for line in lines[3:7]:
      self.assertRegex(line, r"^she said noth... to her moth.. -\d")
    lines = _printed_by("docs/python.md")
    self.assertLen(lines, 2 + 3 + 1 + (3 + 1) + 1 + 3 + 1 + 1)
    long, stream, inside = lines[5], lines[6:10], lines[10:14]
    self.assertStartsWith(long, "153 ")
    self.assertEqual(stream[2].split(" ", 2)[2], stream[3])
    self.assertLess(float(inside[0]), 1e-4)
    self.assertEqual(inside[1:3], ["(3, 7, 16) (3, 7, 16)", "(2, 2, 7, 7)"])
    self.assertStartsWith(lines[3], "she said ")
    self.assertEqual(lines[4], "True")
    drawn, blanks, everything = map(float, lines[-1].split())
    self.assertAlmostEqual(drawn, blanks, delta=1e-3)
    self.assertLess(everything, blanks - 1)

  def test_the_page_on_generation_runs(self):
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    with contextlib.chdir(folder):
      (steps,) = _printed_by("docs/generation.md")
    blanks = [0] * 13 + [1, 2, 3] + [0] * 8 + [4, 5, 6, 7, 8, 9]
    self.assertEqual(steps, str(blanks))
    self.assertIn("Four orders", (folder / "orders.html").read_text())

  @pytest.mark.thorough
  def test_the_loop_around_the_pieces_learns(self):
    lines = _printed_by("docs/pieces.md", 0)
    wrapped = lines.pop(4)
    self.assertRegex(wrapped, r"^she said [a-z ]{23} \d\.\d+$")
    self.assertLen(lines, 4 + 2 + 1)
    losses = [float(line.split()[2]) for line in lines[:4]]
    self.assertBetween(losses[0], 3.0, 3.6)
    self.assertBetween(losses[-1], 2.0, losses[0] - 0.3)
    for line in lines[4:6]:
      self.assertRegex(line, r"^she said [a-z ]{23}: -\d+\.\d nats$")
    self.assertEqual(lines[-1], "[(16, 32, 4, 8), (16, 32, 4, 8)]")

  @pytest.mark.slow
  def test_the_reward_of_policy_gradients_rises(self):
    lines = _printed_by("docs/policy_gradients.md", 0)
    rewards = [float(line.split()[-1]) for line in lines]
    self.assertLen(rewards, 6)
    self.assertLess(rewards[0], 0.15)
    self.assertGreater(rewards[-1], 0.4)

  def test_what_was_trained(self):
    self.assertEqual((_model.step, _model.config.model.T), (2, 40))

  @pytest.mark.slow
  def test_64_bits_elsewhere_change_nothing(self):
    """Another part of the user's program may want them."""
    calls = (  # To generate is to fill a text of blanks.
      lambda model: model.infill("ab__", seed=3)[0],
      lambda model: model.score("abc"),
    )
    want = [call(_model) for call in calls]
    with jax.enable_x64(True):
      got = [call(_model) for call in calls]
      again = aoarm_jax.load(_folder / "run")
      self.assertEqual(jax.numpy.zeros(()).dtype, jax.numpy.float64)
    self.assertEqual(got, want)
    for leaf in jax.tree.leaves(again._params):
      self.assertEqual(leaf.dtype, jax.numpy.float32)

  @pytest.mark.thorough
  def test_texts_depend_on_seed_and_index_alone(self):
    """Many in one call, whatever the batches; a short last one too."""
    few = _model.generate(3, batch_size=8, seed=0)
    many = _model.generate(20, batch_size=8, seed=0)
    for got in (few, _model.generate(20, batch_size=3, seed=0)):
      for text, want in zip(got, many):
        self.assertEqual(text[:2], want[:2])
        self.assertAlmostEqual(text.log_p, want.log_p, delta=1e-3)
    self.assertLen({text.text for text in many}, 20)
    other = _model.generate(3, seed=1)
    self.assertNotEqual(other[0].text, few[0].text)

  @pytest.mark.thorough
  def test_few_numbers_of_texts_compile(self):
    """Rows fill up to a power of four; config.*.batch_size is the most."""
    texts = ["ab", "[b]c", "cd", "d", "ef"]
    scorer, sampler = (
      _model._programs.scorer._jitted,
      _model._programs.sampler._batches._jitted,
    )
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

  @pytest.mark.thorough
  def test_a_session_compiles_few_programs(self):
    """Small numbers of texts, orders, and lengths share their programs."""
    model = aoarm_jax.load(_folder / "run")
    scorer, sampler = (
      model._programs.scorer._jitted,
      model._programs.sampler._batches._jitted,
    )
    for count in (1, 2, 3, 4):
      model.generate(count)
    for order in ("left_to_right", "right_to_left", list(range(1, 41))):
      model.generate(order=order)
    self.assertEqual(sampler._cache_size(), 1)
    for text in ("a_", "ab__", "_" + "a" * 14):
      model.infill(text, 3)
    self.assertEqual(sampler._cache_size(), 2)
    for n in (17, 25, 33, 40):
      for order in ("left_to_right", "right_to_left"):
        model.score("a" * n, order=order)
    self.assertEqual(scorer._cache_size(), 1)

  @pytest.mark.thorough
  def test_a_long_wait_is_said(self):
    """On stderr, once for each; it can be switched off."""
    for progress in (True, False):
      model = aoarm_jax.load(_folder / "run", progress=progress)
      model.config = model.config.replace("telemetry.patience_seconds", 1e-3)
      err = io.StringIO()
      with contextlib.redirect_stderr(err):
        model.generate(3)
        model.score("abc")
      lines = [x for x in err.getvalue().splitlines() if "compiling" in x]
      want = [
        "aoarm_jax: compiling the generation of 3 texts of up to 40 tokens: ",
        "aoarm_jax: compiling the score of 1 text of up to 16 tokens: ",
      ]
      self.assertLen(lines, 2 * progress)
      for line, words in zip(lines, want):
        self.assertRegex(line, f"^{words}[0-9]+s so far$")

  def test_a_fork_is_told_at_once(self):
    """JAX would wait for ever in it."""
    calls = (
      lambda: _model.score("abc"),
      lambda: _model.generate(),
      lambda: _model.infill("a_c"),
      lambda: aoarm_jax.load(_folder / "run"),
    )
    for call in calls:
      out, pipe = os.pipe()
      with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX warns of forks.
        child = os.fork()
      if not child:
        try:
          call()
        except errors.UserError as error:
          os.write(pipe, str(error).encode())
        finally:
          os._exit(0)
      os.close(pipe)
      ready, _, _ = select.select([out], [], [], 60)
      message = os.read(out, 1000).decode() if ready else "it hangs"
      os.kill(child, signal.SIGKILL)
      os.waitpid(child, 0)
      os.close(out)
      self.assertStartsWith(message, f"process {child} is a fork of process ")

  @pytest.mark.thorough
  def test_programs_are_kept_for_later_processes(self):
    name, folder = "jax_compilation_cache_dir", _folder / "cache"
    before = jax.config.values[name]

    def restore():
      jax.config.update(name, before)
      compilation_cache.reset_cache()

    self.addCleanup(restore)
    jax.config.update(name, None)
    compilation_cache.reset_cache()
    jax.jit(lambda x: x + 1)(1.0)  # The user's own program comes first.
    with mock.patch.dict(os.environ, {"XDG_CACHE_HOME": str(folder)}):
      aoarm_jax.load(_folder / "run").score("abc")
    self.assertNotEmpty(list((folder / "aoarm_jax" / "xla").glob("jit_*")))

  @pytest.mark.thorough
  def test_prompts_of_several_lengths(self):
    """Each as if it stood alone at its index."""
    texts = ["ab__", "a_c" * 10, "______"]
    found = _model.infill(texts, count=3, seed=7)
    for text, samples in zip(texts, found):
      self.assertLen({sample.text for sample in samples}, 3)
      for sample in samples:
        self.assertRegex(sample.text, f"^{text.replace('_', '[a-z ]')}$")
        self.assertEqual(sorted(sample.order), list(range(1, len(text) + 1)))
    self.assertEqual(_model.infill(texts[0], count=3, seed=7), found[0])

  def test_another_blank(self):
    want, got = _model.score("a[b]_"), _model.score("a[b]?", blank="?")
    self.assertEqual(got[1:], want[1:])
    want = _model.infill("_b", seed=0)
    self.assertEqual(_model.infill("?b", blank="?", seed=0), want)

  @pytest.mark.thorough
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
    before = _model._programs.scorer._jitted._cache_size()
    for orders in ([x.order for x in texts], [x.order[::-1] for x in texts]):
      scores = _model.score(texts, order=orders)
      for text, score, order in zip(texts, scores, orders):
        self.assertEqual(score.order, order)
        self.assertEqual(score.text, text.text)
        if order == text.order:
          self.assertAlmostEqual(score.log_p, text.log_p, delta=1e-3)
    self.assertEqual(_model._programs.scorer._jitted._cache_size(), before)
    one = _model.score(texts[0], order=np.array(texts[0].order))
    self.assertAlmostEqual(one.log_p, texts[0].log_p, delta=1e-3)

  def test_numbers_of_numpy(self):
    for temperature in (np.float64(0.5), np.float32(0.5)):
      (text,) = _model.generate(np.int64(1), temperature=temperature)
    self.assertLen(text.text, 40)

  @parameterized.parameters("parallel", "speculative", "adaptive")
  @pytest.mark.thorough
  def test_methods_and_given_orders(self, method):
    (text,) = _model.infill("_b__", method=method, order=[4, 3, 2, 1])
    self.assertEqual(text.order[0], 2)
    if method != "adaptive":
      self.assertEqual(text.order, [2, 4, 3, 1])

  @parameterized.parameters(
    (lambda m: m.infill("abc"), "text 1='abc' has no blank '_'"),
    (lambda m: m.infill(["a_", "_X"]), "text 2: char27: character 'X' at off"),
    (lambda m: m.infill("_" * 41), "text 1 has 41 tokens; the model generates"),
    (
      lambda m: m.score("[a]" + "a" * 40),
      "text 1 has 41 tokens; a text of mor",
    ),
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
    (lambda m: m.score("ab", orders=4), "orders=4: has no effect here; it cou"),
    (lambda m: m.score("ab", seed=4), ".*counts with order='uniform' only; o"),
    (lambda m: m.generate(width=8), "width=8: .* only; method is 'sequential'"),
    (
      lambda m: m.generate(score="margin"),
      "score='margin': has no effect ",
    ),
    (
      lambda m: m.generate(schedule="cosine"),
      "schedule='cosine': has no effe",
    ),
    (lambda m: m.generate(top_k=1, temperature=0), "top_k=1: has no effect he"),
    (lambda m: m.generate(method="parallel", steps=4, width=2), "width=2: has"),
    (lambda m: m.generate(every=2), "every: no such option; there are: count"),
    (lambda m: m.generate(blank="?"), "blank: no such option; there are: cou"),
    (lambda m: m.generate(1.5), "count=1.5: must be a whole number"),
    (lambda m: m.generate(prompt="aX"), "prompt: char27: character 'X' at of"),
    (lambda m: m.generate(prompt="a_"), "prompt: .*; infill fills every '_'$"),
    (lambda m: m.generate(prompt="ab", length=2), "prompt has 2 tokens, and t"),
    (lambda m: m.generate(prompt=3), "prompt=3 is no text: give a str"),
    (
      lambda m: m.generate(prompt="?!", normalise=True),
      r"prompt='\?!': has no letter from a to z and no digit, so nothing is",
    ),
    (
      lambda m: m.score(["a", "[!]"], normalise=True),
      r"text 2='\[!\]': has no",
    ),
    (lambda m: m.infill("Éè", normalise=True), "text 1='Éè': has no letter"),
    (
      lambda m: m.infill("Hello!", normalise=True),
      r"text 1 \(in normal form\)='hello' has no blank",
    ),
    (
      lambda m: m.score("Hello, 1[", normalise=True),
      r"text 1 \(in normal form\): '\[' at offset 9 has no partner",
    ),
    (
      lambda m: m.score("ab", normalise="no"),
      "normalise='no': must be True, F",
    ),
    (lambda m: m.generate(length=41), "length=41: must be at least 1 and at m"),
    (lambda m: m.score({"ab"}), "{'ab'} is no text"),
    (lambda m: m.score(iter(["ab", 3])), "3 is no text"),
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

  def test_every_kind_of_error_is_at_the_top(self):
    """A user catches them without a search for their modules."""
    # The last one needs an extra.
    apart = (
      "aoarm_jax.study",
      "aoarm_jax.tools",
      "aoarm_jax.benchmark.lm_eval",
    )
    for module in pkgutil.walk_packages(aoarm_jax.__path__, "aoarm_jax."):
      if not module.name.startswith(apart):
        importlib.import_module(module.name)
    for kind in _subclasses(errors.UserError):
      if not kind.__module__.startswith(("aoarm_jax.study", "aoarm_jax.tools")):
        self.assertIs(getattr(aoarm_jax, kind.__name__), kind)
        self.assertIn(kind.__name__, dir(aoarm_jax))
    with self.assertRaises(aoarm_jax.UserError):
      _model.generate(0)
    with self.assertRaisesRegex(AttributeError, "no attribute 'Absent'"):
      _ = aoarm_jax.Absent

  def test_a_model_says_what_it_is(self):
    self.assertRegex(
      repr(_model),
      "^<aoarm_jax.Model '.*/run': step 2, two_stream, [0-9,]+ parameters, "
      "T=40, tokenizer char27>$",
    )

  def test_editors_complete_the_options(self):
    """The annotations name the fields of the config."""
    sample = {field.name for field in dataclasses.fields(config.Sample)}
    score = {field.name for field in dataclasses.fields(config.Score)}
    names = {*api.GenerateOptions.__annotations__}
    others = {"count", "length", "every", "keep_last", "blank"}
    self.assertEqual(names, sample - others)
    self.assertEqual({*api.InfillOptions.__annotations__}, names | {"blank"})
    self.assertEqual({*api.ScoreOptions.__annotations__}, score)

  def test_a_seed_is_fresh_and_comes_back(self):
    first, second = _model.generate(2), _model.generate(2)
    self.assertNotEqual(first[0].seed, second[0].seed)
    self.assertNotEqual(first[0].text, second[0].text)
    self.assertEqual(_model.generate(2, seed=first[1].seed), first)
    (filled,) = _model.infill("a____c")
    self.assertEqual(_model.infill("a____c", seed=filled.seed), [filled])
    self.assertNotEqual(_model.infill("a____c", seed=None)[0].seed, filled.seed)

  def test_a_text_is_continued(self):
    for text in _model.generate(3, prompt="a_b".replace("_", " "), length=9):
      self.assertRegex(text.text, "^a b[a-z ]{6}$")
      self.assertEqual(text.order[:3], [1, 2, 3])
    (text,) = _model.generate(length=5)
    self.assertLen(text.text, 5)
    # It is what infill draws.
    want = _model.infill("ab_____", seed=3)
    self.assertEqual(_model.generate(prompt="ab", length=7, seed=3), want)

  @pytest.mark.thorough
  def test_a_prompt_in_normal_form(self):
    """It goes on where it ends: within a word, or after a space."""
    for prompt, start in (
      ("She said: No", "she said no"),
      ("She said, ", "she said "),
      ("", ""),
    ):
      want = _model.infill(start + "___", seed=3)
      n = len(start) + 3
      got = _model.generate(prompt=prompt, length=n, seed=3, normalise=True)
      self.assertEqual(got, want)
      normal = _model.config.replace("data.normalise", True)
      with mock.patch.object(_model, "config", normal):
        got = _model.generate(prompt=prompt, length=n, seed=3)
        self.assertEqual(got, want)
        with self.assertRaisesRegex(aoarm_jax.PromptError, "character ','"):
          _model.generate(prompt="a, b", normalise=False)

  @parameterized.parameters(
    iter, tuple, np.array, lambda x: np.array(x, object), lambda x: map(str, x)
  )
  def test_several_texts(self, kind):
    """Generators and arrays are read like lists."""
    texts = ["ab_", "c_"]
    scores = _model.score(kind(texts))
    self.assertEqual(scores, _model.score(texts))
    self.assertIs(type(scores[0].text), str)
    filled = _model.infill(kind(texts), seed=0)
    self.assertEqual(filled, _model.infill(texts, seed=0))

  def test_a_step_is_loaded(self):
    self.assertEqual(aoarm_jax.load(_folder / "run", step=2).step, 2)
    for step, message in (
      (7, "no checkpoint of step 7 in .*checkpoints; steps there: 2$"),
      ("x", "step='x': must be a whole number"),
    ):
      with self.assertRaisesRegex(aoarm_jax.UserError, message):
        aoarm_jax.load(_folder / "run", step=step)
    with self.assertRaisesRegex(aoarm_jax.ConfigError, "give one of the two"):
      aoarm_jax.load(_folder / "run", step=2, read="best")

  def test_no_run(self):
    with self.assertRaisesRegex(
      Exception, "absent/config.json: no such file; .* neither the directory"
    ):
      aoarm_jax.load(_folder / "absent")


@pytest.mark.thorough
class CommandTest(parameterized.TestCase):
  @parameterized.parameters(1e-3, 0.0)
  @pytest.mark.slow
  def test_training_says_what_takes_long(self, seconds):
    self.addCleanup(patience.set_seconds, 2.0)
    command = helpers.arguments(
      _folder / f"patience{seconds}",
      {
        "model.T": 40,
        "data.path": _folder / "text",
        "train.steps": 1,
        "eval.batches": 1,
        "sample.count": 1,
        "telemetry.patience_seconds": seconds,
      },
    )
    with self.assertLogs("absl", "INFO") as logs:
      helpers.run(command)
    for words in (
      "compiling the first parameters",
      "compiling the training step",
      "compiling and evaluating any_order",
      "compiling the generation of 1 text of",
    ):
      said = [x for x in logs.output if re.search(f":{words}.* so far$", x)]
      self.assertEqual(bool(said), seconds > 0, words)

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

  def test_a_page_replays_what_is_printed(self):
    path = _folder / "pages" / "x.html"
    samples = _folder / "run" / "samples"
    before = {*samples.iterdir()}
    lines = _run(
      *("--mode=sample", "--prompt=ab___", "--config.sample.count=2"),
      f"--html={path}",
    )
    (written,) = {*samples.iterdir()} - before
    page = path.read_text()
    (data,) = re.findall(r'<script id="data".*?>(.*?)</script>', page)
    data = json.loads(data)
    self.assertEqual(data["title"], "ab___")
    self.assertEqual(data["facts"]["mechanism"], "two_stream")
    self.assertLen(data["panels"], 2)
    for panel, line, record in zip(
      data["panels"], lines, written.read_text().splitlines()
    ):
      cells, record = panel["cells"], json.loads(record)
      self.assertEqual("".join(cell["text"] for cell in cells), line)
      self.assertEqual(
        [step for cell in cells for step in cell["steps"]], record["steps"]
      )
      self.assertEqual(sorted(record["steps"]), [0, 0, 1, 2, 3])
      self.assertEqual([cell["logP"] for cell in cells], record["token_log_p"])

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
    self.assertEqual(lines[0]["text"], _model.infill("ab__", 2, seed=0)[0].text)

  def test_a_file_is_printed_by_parts(self):
    """The same texts; what was done before a stop is there.

    Batches of other sizes may round otherwise. So numbers agree to some ulps of
    the logits, which are below 8 here.
    """
    path = _folder / "many.txt"
    path.write_text("ab__\nc_\n_d\n_\n")
    command = "--mode=sample", f"--input={path}", "--config.sample.count=2"
    whole = _run(*command)
    with mock.patch.object(sample_lib, "_AT_ONCE", 3):
      parts = [json.loads(line) for line in _run(*command)]
    for part, line in zip(parts, map(json.loads, whole), strict=True):
      for name in ("log_p", "token_log_p"):
        np.testing.assert_allclose(
          part.pop(name), line.pop(name), rtol=0, atol=16 * 8 * 2.0**-24
        )
      self.assertEqual(part, line)
    fill, calls = generate.Sampler.fill, []

    def stopped(*arguments, **options):
      calls.append(1)
      if len(calls) > 1:
        raise KeyboardInterrupt
      return fill(*arguments, **options)

    out = io.StringIO()
    with (
      mock.patch.object(sample_lib, "_AT_ONCE", 2),
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
    (("score", "--input=/"), "--input=/: is a folder, and a file"),
    (("sample", "--prompt="), "--prompt is empty"),
    (("score", "--text=a[b"), "--text: '.' at offset 1 has no partner"),
    (("score", "--text=aXb"), "--text: char27: character 'X' at offset 1"),
    (("score", "--text=a", "--config.score.marks=["), "config.score.marks='.'"),
    (("sample", "--input={bad}"), "{bad}, line 2='cd' has no blank '_'"),
    (
      ("score", "--input={long}"),
      "{long}, line 4 has 41 tokens; .* .2 others are wrong too; the next is "
      "{long}, line 6",
    ),
    (
      ("sample", "--input={long}"),
      "{long}, line 4 has 41 tokens; the model ge",
    ),
    (
      ("score", "--input={mixed}"),
      "{mixed}, line 3: '.' at offset 1 has no partner .* .1 other is wrong",
    ),
    (
      ("sample", "--input={mixed}"),
      "{mixed}, line 1='ab' has no blank '_': .* .2 others are wrong",
    ),
    (("score", "--input={utf16}"), "{utf16}: is not text: it is UTF-16 text"),
    (("score", "--input={none}"), "{none} is empty: one text a line"),
  )
  def test_commands_that_cannot_be(self, command, message):
    names = ("bad", "none", "utf16", "long", "mixed")
    files = {name: str(_folder / name) for name in names}
    (_folder / "utf16").write_text("ab\ncd\n", encoding="utf-16")
    (_folder / "bad").write_text("a_\ncd\n")
    (_folder / "none").write_text("")
    long, longer = "d" * 40 + "_", "d" * 41 + "_"
    lines = ["ab_", "c_", "d_", long, "e_", long, longer]
    (_folder / "long").write_text("\n".join(lines))
    (_folder / "mixed").write_text("ab\nc_\na[b_\naXb\n")
    mode, *rest = (part.format(**files) for part in command)
    out = io.StringIO()
    with (
      self.assertRaisesRegex(Exception, message.format(**files)) as caught,
      mock.patch.object(score_lib, "_AT_ONCE", 2),
      mock.patch.object(sample_lib, "_AT_ONCE", 2),
      contextlib.redirect_stdout(out),
    ):
      command = [f"--config={helpers.TINY}", f"--workdir={_folder / 'run'}"]
      helpers.run([*command, f"--mode={mode}", *rest])
    self.assertEqual(out.getvalue(), "")
    self.assertLen(str(caught.exception).splitlines(), 1)
    self.assertIsInstance(caught.exception, (errors.UserError, flags.Error))


if __name__ == "__main__":
  absltest.main()
