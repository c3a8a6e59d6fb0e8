"""lm-eval itself on a tiny run, with tasks of local files."""

import configparser
import contextlib
import importlib.metadata
import importlib.util
import json
import math
import pathlib
import re
import shlex
import subprocess
import sys
import tempfile
from unittest import mock

import helpers
import pytest
from absl.testing import absltest, parameterized

import aoarm_jax

pytestmark = [
  pytest.mark.interop,
  # Of lm-eval and of what it imports.
  pytest.mark.filterwarnings("default"),
]
if not importlib.util.find_spec("lm_eval"):
  pytest.skip("needs the extra lm-eval", allow_module_level=True)

_PAGE = (helpers.ROOT / "docs" / "harness.md").read_text()
_TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
"""
_TASKS = {
  "rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}, {metric: byte_perplexity}]
""",
  "choice": """
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{metric: acc}]
""",
  "fill": """
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{text}}"
generation_kwargs: {max_gen_toks: 5, until: ["zz"]}
metric_list: [{metric: exact_match}]
""",
}
_DOCUMENTS = [
  {"text": "abcdefgh ik", "context": "abcd", "choices": ["ef", "zz", "a"]},
  {"text": "bdfhjlnprtvxz acegikmo", "context": "ac", "choices": ["bd", "e"]},
]


def setUpModule():
  global _folder, _stack
  _stack = contextlib.ExitStack()
  _stack.enter_context(helpers.quick_compilation())
  _folder = pathlib.Path(_stack.enter_context(tempfile.TemporaryDirectory()))
  # Nothing is looked up outside, and nothing is left in the user's cache.
  offline = {
    "HF_HOME": str(_folder / "cache"),
    "HF_DATASETS_CACHE": str(_folder / "cache"),
    "HF_HUB_OFFLINE": "1",
  }
  _stack.enter_context(mock.patch.dict("os.environ", offline))
  helpers.write_text(_folder / "text")
  helpers.run(
    helpers.arguments(
      _folder / "run",
      {
        "data.path": _folder / "text",
        "train.steps": 20,
        "eval.batches": 1,
        "sample.count": 1,
      },
    )
  )
  lines = "".join(json.dumps(document) + "\n" for document in _DOCUMENTS)
  (_folder / "documents.jsonl").write_text(lines)
  (_folder / "tasks").mkdir()
  for name, rest in _TASKS.items():
    head = _TASK.format(name=f"x_{name}", file=_folder / "documents.jsonl")
    (_folder / "tasks" / f"{name}.yaml").write_text(head + rest)


def tearDownModule():
  _stack.close()


def _evaluated(task, **options):
  """The results of lm-eval for a task."""
  import lm_eval
  from lm_eval import tasks

  import aoarm_jax.benchmark.lm_eval  # noqa: F401

  return lm_eval.simple_evaluate(
    "aoarm_jax",
    {"workdir": str(_folder / "run"), **options},
    [f"x_{task}"],
    task_manager=tasks.TaskManager(
      include_path=str(_folder / "tasks"), include_defaults=False
    ),
    bootstrap_iters=0,
  )


class LmEvalTest(parameterized.TestCase):
  def test_rolling_equals_scores(self):
    """The second text is longer than T, which is 16."""
    results = _evaluated("rolling", stride=4)
    model = aoarm_jax.load(_folder / "run")
    short, long = (document["text"] for document in _DOCUMENTS)
    log_p = [model.score(short).log_p, model.score(long, stride=4).log_p]
    for sample, want in zip(results["samples"]["x_rolling"], log_p):
      got = sample["filtered_resps"][0]
      self.assertAlmostEqual(got, want, delta=1e-4)
    bits = -sum(log_p) / math.log(2) / (len(short) + len(long))
    got = results["results"]["x_rolling"]["bits_per_byte,none"]
    self.assertAlmostEqual(got, bits, delta=1e-5)

  @parameterized.parameters("left_to_right", "uniform")
  def test_choices_equal_scores(self, order):
    results = _evaluated("choice", order=order, orders=3, batch_size=2)
    model = aoarm_jax.load(_folder / "run")
    options = {"orders": 3} if order == "uniform" else {}
    hits = 0
    for document, sample in zip(_DOCUMENTS, results["samples"]["x_choice"]):
      got = [answer[0] for answer in sample["filtered_resps"]]
      want = [
        model.score(
          f"{document['context']}[{choice}]", order=order, **options
        ).log_p
        for choice in document["choices"]
      ]
      for a, b in zip(got, want, strict=True):
        self.assertAlmostEqual(a, b, delta=1e-4)
      hits += want.index(max(want)) == 0
    accuracy = results["results"]["x_choice"]["acc,none"]
    self.assertEqual(accuracy, hits / len(_DOCUMENTS))

  def test_generation_equals_generate(self):
    results = _evaluated("fill")
    model = aoarm_jax.load(_folder / "run")
    for document, sample in zip(_DOCUMENTS, results["samples"]["x_fill"]):
      (text,) = model.generate(
        prompt=document["context"],
        length=len(document["context"]) + 5,
        order="left_to_right",
        temperature=0.0,
      )
      want = text.text.removeprefix(document["context"])
      self.assertEqual(sample["filtered_resps"], [want])

  def test_the_entry_point_names_the_model(self):
    """As lm-eval finds it in later versions."""
    from aoarm_jax.benchmark import lm_eval

    setup = configparser.ConfigParser()
    setup.read(helpers.ROOT / "setup.cfg")
    points = setup["options.entry_points"]["lm_eval.models"].strip()
    name, value = points.split(" = ")
    self.assertEqual(name, "aoarm_jax")
    point = importlib.metadata.EntryPoint(name, value, "lm_eval.models")
    self.assertIs(point.load(), lm_eval.Model)

  def test_the_page(self):
    """Its task, its commands and its Python, with the run of here."""
    folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    (folder / "tasks" / "novels").mkdir(parents=True)
    (folder / "runs").mkdir()
    (folder / "runs" / "two_stream-tiny").symlink_to(_folder / "run")
    blocks = dict(re.findall(r"```(\w+)\n(.*?)```", _PAGE, re.DOTALL))
    task = folder / "tasks" / "novels"
    (task / "novels.yaml").write_text(blocks["yaml"])
    # The tiny model reads 16 tokens.
    (task / "novels.jsonl").write_text(blocks["json"])

    def run(*arguments):
      return subprocess.run(
        [sys.executable, *arguments],
        env=helpers.environment(),
        cwd=folder,
        capture_output=True,
        text=True,
      )

    command = shlex.split(blocks["bash"])
    self.assertEqual(command[:2], ["python", "-m"])
    done = run(*command[1:])
    self.assertEqual(done.returncode, 0, done.stderr)
    (line,) = [x for x in done.stdout.splitlines() if x.startswith("|novels")]
    accuracy = float(line.split("|")[7])
    self.assertIn(accuracy, (0.0, 0.5, 1.0))
    done = run("-c", blocks["python"])
    self.assertEqual(done.stdout.splitlines()[-1:], [str(accuracy)])
    absent = [x.replace("two_stream-tiny", "absent") for x in command[1:]]
    done = run(*absent)
    self.assertEqual(done.returncode, 1, done.stderr)
    self.assertStartsWith(done.stderr.splitlines()[-1], "aoarm_jax: error: ")


if __name__ == "__main__":
  absltest.main()
