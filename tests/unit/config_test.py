"""The schema, the experiment files, and the rules between fields."""

import configparser
import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import pickle
import tempfile
import tracemalloc

from absl.testing import absltest, parameterized

from aoarm_jax.config import experiments
from aoarm_jax.config import rules as config_rules
from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import corpora, tokenizers

RANGE = "must be (at least|at most|above|below) "
CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"
# Of one run each; cells_test.py has the studies.
EXPERIMENTS = sorted(
  path.stem
  for path in CONFIGS.glob("*.py")
  if not path.stem.startswith("study_")
)


def get_config(experiment: str, variant: str):
  """What `--config=configs/<experiment>.py:<variant>` gives."""
  path = CONFIGS / f"{experiment}.py"
  spec = importlib.util.spec_from_file_location(experiment, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(variant)


def changed(changes, config=None):
  """A Config with fields replaced, by their paths below it."""
  tree = dataclasses.asdict(config or config_lib.Config())
  for path, value in changes.items():
    *sections, field = path.split(".")
    node = tree
    for name in sections:
      node = node[name]
    node[field] = value
  return config_lib.from_dict(tree)


def bounds():
  """(path, value that may be, value that may not) at each end of a range."""
  for path, field, value in config_lib.leaves(config_lib.Config()):
    path, kind = path.removeprefix("config."), type(value)
    step = kind(1) if kind is int else 0.125
    for border, sign in (("low", -1), ("high", 1)):
      edge = field.metadata.get(border)
      if edge is not None:
        yield path, kind(edge), kind(edge) + sign * step
    for border, sign in (("above", 1), ("below", -1)):
      edge = field.metadata.get(border)
      if edge is not None:
        yield path, kind(edge) + sign * step, kind(edge)


class ExperimentsTest(parameterized.TestCase):
  def test_the_three_of_the_readme_are_there(self):
    self.assertContainsSubset(
      {"two_stream", "decoupled_rope", "causal"}, EXPERIMENTS
    )

  @parameterized.product(
    experiment=EXPERIMENTS, variant=list(experiments.VARIANTS)
  )
  def test_every_variant_is_valid(self, experiment, variant):
    config = config_rules.validate(
      config_lib.from_config_dict(get_config(experiment, variant))
    )
    self.assertEqual((config.name, config.variant), (experiment, variant))
    self.assertEqual(config_lib.from_json(config_lib.to_json(config)), config)
    if experiment in ("two_stream", "decoupled_rope", "causal"):
      self.assertEqual(config.model.mechanism, experiment)

  @parameterized.parameters(*EXPERIMENTS)
  def test_sizes(self, experiment):
    models = {
      variant: config_lib.from_config_dict(
        get_config(experiment, variant)
      ).model
      for variant in experiments.VARIANTS
    }
    sizes = {v: (m.D, m.L, m.N, m.T) for v, m in models.items()}
    self.assertEqual(sizes["default"], (256, 10, 4, 128))
    self.assertEqual(sizes["long"], (256, 10, 4, 1024))
    self.assertEqual(sizes["base"], (768, 12, 12, 256))
    self.assertEqual(sizes["bpe"], (256, 10, 4, 256))
    self.assertEqual(sizes["124m"], (768, 12, 12, 1024))
    self.assertEqual(sizes["qwen3-8b"], (4096, 36, 32, 1024))

  def test_an_experiment_has_a_name(self):
    self.assertContainsSubset(EXPERIMENTS, experiments.names())
    path = str(CONFIGS / "two_stream.py")
    self.assertEqual(experiments.find("two_stream:tiny"), f"{path}:tiny")
    self.assertEqual(experiments.find("two_stream"), path)
    with contextlib.chdir(self.enterContext(tempfile.TemporaryDirectory())):
      # As the docs have it, where no checkout is.
      published = "configs/two_stream.py:tiny"
      self.assertEqual(experiments.find(published), f"{path}:tiny")
      pathlib.Path("configs").mkdir()
      pathlib.Path("configs/two_stream.py").write_text("")
      self.assertEqual(experiments.find(published), published)
    for own in ("./two_stream:tiny", "mine.py", "configs/mine.py", ""):
      self.assertEqual(experiments.find(own), own)

  @parameterized.parameters(
    ("twostream:tiny", "'twostream'; did you mean two_stream\\?"),
    ("xyz5", "'xyz5'; there are: any_subset, .*--config=./xyz5.py"),
  )
  def test_no_experiment_of_that_name(self, name, message):
    with self.assertRaisesRegex(config_lib.ConfigError, message):
      experiments.find(name)

  @parameterized.parameters(
    "gs://b/two_stream.py:tiny", "https://x.org/mine.py", "file:///x.py"
  )
  def test_an_experiment_is_not_read_from_an_address(self, text):
    start = text.partition("//")[0] + "//"
    with self.assertRaisesRegex(
      config_lib.ConfigError, f"^--config={text}: .* not read from {start}"
    ) as caught:
      experiments.find(text)
    self.assertNotIn("\n", str(caught.exception))

  def test_a_wheel_has_the_experiments_and_every_package(self):
    """The slow test of a whole wheel is in main_test.py."""
    parser = configparser.ConfigParser()
    parser.read(CONFIGS.parent / "setup.cfg")
    options = parser["options"]
    listed = set(options["packages"].split())
    there = {
      str(path.parent.relative_to(CONFIGS.parent)).replace(os.sep, ".")
      for name in ("aoarm_jax", "pallas_kernels")
      for path in (CONFIGS.parent / name).rglob("__init__.py")
    }
    self.assertSetEqual(listed, there | {"aoarm_jax.configs"})
    self.assertEqual(
      options["package_dir"].split(),
      [
        "aoarm_jax.configs",
        "=",
        "configs",
      ],
    )

  def test_base_wants_text8_when_it_is_read_and_says_where_it_is(self):
    data = config_lib.from_config_dict(get_config("two_stream", "base")).data
    with self.assertRaisesRegex(corpora.DataError, "http.*--config.data.path"):
      corpora.load(data.corpus, data.path, tokenizers.get(data.tokenizer))

  def test_no_variant_is_the_default(self):
    self.assertEqual(get_config("causal", "").variant, "default")

  def test_unknown_variant(self):
    with self.assertRaisesRegex(
      config_lib.ConfigError, "two_stream.py .*'huge'.*default, long, bpe, "
    ):
      get_config("two_stream", "huge")

  def test_locked(self):
    config = get_config("two_stream", "tiny")
    with self.assertRaises(AttributeError):
      config.train.stepz = 3
    with self.assertRaises(TypeError):
      config.train.steps = "many"

  def test_changes_of_an_experiment_file_are_typed_and_known(self):
    with self.assertRaisesRegex(config_lib.ConfigError, "config.train.steps"):
      config_lib.from_config_dict(
        experiments.experiment("new", "tiny", train={"steps": "many"})
      )
    with self.assertRaisesRegex((AttributeError, KeyError), "stepz"):
      experiments.experiment("new", "tiny", train={"stepz": 3})


class SchemaTest(parameterized.TestCase):
  def test_hashable_and_equal_by_value(self):
    one, two = (
      changed({"orders.given": [2, 1]}),
      changed({"orders.given": [2, 1]}),
    )
    self.assertEqual((one, hash(one)), (two, hash(two)))
    self.assertNotEqual(one, changed({"orders.given": [1, 2]}))
    self.assertEqual(pickle.loads(pickle.dumps(one)), one)
    with self.assertRaises(dataclasses.FrozenInstanceError):
      one.seed = 2

  def test_every_leaf_has_a_doc_and_bindings_that_are_known(self):
    for path, field, _ in config_lib.leaves(config_lib.Config()):
      if path not in ("config.name", "config.variant"):
        self.assertTrue(field.metadata["doc"], path)
        self.assertIn(field.metadata["binds"], ("", "run", "model"), path)

  def test_json_holds_every_field_with_its_type(self):
    config = changed(
      {
        "orders.given": [3, 1, 2],
        "optimizer.peak_learning_rate": 1 / 3,
        "data.path": 'a "b" ☃\n',
        "seed": 2**31 - 1,
        "compute.remat": True,
        "eval.estimators": ["ensembled"],
      }
    )
    again = config_lib.from_json(config_lib.to_json(config))
    self.assertEqual(again, config)
    for (path, _, a), (_, _, b) in zip(
      config_lib.leaves(config), config_lib.leaves(again)
    ):
      self.assertIs(type(a), type(b), path)

  def test_a_huge_length_takes_no_memory(self):
    """A config.json may be a stranger's."""
    config = changed({"model.T": 10**6})
    tracemalloc.start()
    self.addCleanup(tracemalloc.stop)
    config_rules.validate(config)
    self.assertLess(tracemalloc.get_traced_memory()[1], 10**6)

  def test_config_dict_and_back(self):
    config = changed({"orders.given": [2, 1], "model.T": 2})
    self.assertEqual(
      config_lib.from_config_dict(config_lib.to_config_dict(config)), config
    )

  def test_missing_fields_take_their_defaults(self):
    self.assertEqual(config_lib.from_json("{}"), config_lib.Config())
    self.assertEqual(
      config_lib.from_json('{"model": {"T": 7}}'), changed({"model.T": 7})
    )

  @parameterized.parameters(
    ({"nodel": {}}, "config.nodel: no such field; config has: name, "),
    ({"model": {"d": 3}}, "config.model.d: no such field; config.model has"),
    ({"model": {"D": 3.0}}, "config.model.D=3.0: must be a whole number (int)"),
    (
      {"model": {"D": True}},
      "config.model.D=True: must be a whole number (int)",
    ),
    ({"model": {"D": None}}, "config.model.D=None"),
    (
      {"compute": {"remat": 1}},
      "config.compute.remat=1: must be true or false (bool)",
    ),
    (
      {"optimizer": {"b1": "1"}},
      "config.optimizer.b1='1': must be a number (float)",
    ),
    (
      {"optimizer": {"b1": False}},
      "config.optimizer.b1=False: must be a number (float)",
    ),
    ({"orders": {"given": "12"}}, "config.orders.given='12': must be a tuple"),
    ({"model": 3}, "config.model=3: a section; it has: mechanism, sent"),
    ([1], "config=[1]: a section; it has: name, variant"),
    ({"data": {"path": 3}}, "config.data.path=3: must be a text (str)"),
  )
  def test_what_json_may_not_hold(self, tree, message):
    with self.assertRaises(config_lib.ConfigError) as caught:
      config_lib.from_json(json.dumps(tree))
    self.assertStartsWith(str(caught.exception), message)

  def test_whole_numbers_are_floats_where_floats_belong(self):
    b1 = config_lib.from_json('{"optimizer": {"b1": 1}}').optimizer.b1
    self.assertIs(type(b1), float)

  def test_sizes_that_follow(self):
    model = changed({"model.sentinels": 2, "model.T": 7}).model
    self.assertEqual((model.H, model.F, model.S), (64, 1024, 8))
    self.assertEqual(model.key_heads, 4)
    model = changed({"model.kv_heads": 2, "model.head_size": 96}).model
    self.assertEqual((model.H, model.key_heads), (96, 2))
    self.assertEqual(changed({"train.batch_size": 6}).eval_batch_size, 6)
    self.assertEqual(changed({"eval.batch_size": 4}).eval_batch_size, 4)


_SCALED = {"model.rope_scaling": "llama3", "model.rope_original_T": 64}
_LEARNED = {"model.positions": "learned", "model.norm": "layer"}


class RulesTest(parameterized.TestCase):
  def refuse(self, changes, field):
    with self.assertRaises(config_lib.ConfigError) as caught:
      config_rules.validate(changed(changes))
    self.assertStartsWith(str(caught.exception), f"config.{field}=")
    self.assertNotIn("\n", str(caught.exception))
    return str(caught.exception)

  @parameterized.parameters(*bounds())
  def test_range(self, path, edge, beyond):
    message = self.refuse({path: beyond}, path)
    self.assertRegex(message, RANGE)
    try:
      config_rules.validate(changed({path: edge}))
    except config_lib.ConfigError as error:  # Another rule may be stricter.
      self.assertNotRegex(str(error), RANGE)

  @parameterized.parameters(
    "model.mechanism",
    "orders.family",
    "optimizer.schedule",
    "eval.split",
    "sample.order",
    "compute.dtype",
    "compute.attention",
    "data.corpus",
    "data.tokenizer",
  )
  def test_choice(self, path):
    self.assertIn("'typo' is not one of", self.refuse({path: "typo"}, path))
    self.assertNotIn("several", self.refuse({path: "typo,typo"}, path))

  def test_docstrings_are_gone(self):
    message = self.refuse({"data.corpus": "docstrings"}, "data.corpus")
    self.assertIn("--config.data.corpus=books", message)

  def test_choices_of_a_tuple(self):
    message = self.refuse(
      {"eval.estimators": ["any_order", "typo"]}, "eval.estimators"
    )
    self.assertIn("'typo' is not one of any_order", message)
    message = self.refuse(
      {"eval.estimators": ("any_order,elbo",)}, "eval.estimators"
    )
    self.assertIn("write several as", message)

  @parameterized.parameters(float("nan"), float("inf"))
  def test_not_finite(self, value):
    self.refuse({"optimizer.eps": value}, "optimizer.eps")

  @parameterized.parameters(
    "seed", "train.steps", "optimizer.warmup_steps", "eval.seed", "sample.seed"
  )
  def test_whole_numbers_fit_the_device(self, path):
    self.refuse({path: 2**31}, path)
    self.refuse({path: 2**70}, path)

  @parameterized.named_parameters(
    ("heads", {"model.N": 3}, "model.N"),
    ("odd_heads", {"model.D": 12, "model.N": 4}, "model.N"),
    ("odd_head", {"model.head_size": 7}, "model.head_size"),
    ("key_heads", {"model.N": 4, "model.kv_heads": 3}, "model.kv_heads"),
    ("more_key_heads", {"model.N": 4, "model.kv_heads": 8}, "model.kv_heads"),
    ("mlp", {"model.mlp": "relu"}, "model.mlp"),
    ("epsilon", {"model.norm_epsilon": 0.0}, "model.norm_epsilon"),
    (
      "kernels_norm_heads",
      {"model.qk_norm": False, "compute.rowwise": "mosaic_gpu"},
      "compute.rowwise",
    ),
    (
      "kernels_layer_norm",
      {"model.norm": "layer", "compute.rowwise": "mosaic_gpu"},
      "compute.rowwise",
    ),
    (
      "kernels_add_biases",
      {"model.biases": True, "compute.rowwise": "mosaic_gpu"},
      "compute.rowwise",
    ),
    *(
      (
        f"learned_positions_of_{mechanism}",
        {"model.mechanism": mechanism, "model.positions": "learned"},
        "model.positions",
      )
      for mechanism in ("decoupled_rope_content", "register", "ao_gpt")
    ),
    (
      "shifted_positions",
      {
        "model.mechanism": "decoupled_rope",
        "model.positions": "learned",
        "model.shifted": True,
      },
      "model.positions",
    ),
    (
      "no_rotation_of_learned_positions",
      _SCALED | {"model.positions": "learned"},
      "model.rope_scaling",
    ),
    ("no_scaling", {"model.rope_factor": 8.0}, "model.rope_factor"),
    ("no_original", {"model.rope_scaling": "yarn"}, "model.rope_original_T"),
    (
      "turns",
      _SCALED | {"model.rope_slow_turns": 4.0},
      "model.rope_slow_turns",
    ),
    ("base", _SCALED | {"model.rope_base": 1.0}, "model.rope_base"),
    (
      "no_rotation",
      _SCALED | {"model.mechanism": "sigma_gpt"},
      "model.rope_scaling",
    ),
    (
      "causal_order",
      {
        "model.mechanism": "causal",
        "sample.order": "left_to_right",
        "eval.estimators": ["left_to_right"],
      },
      "orders.family",
    ),
    (
      "causal_sample",
      {
        "model.mechanism": "causal",
        "orders.family": "left_to_right",
        "eval.estimators": ["left_to_right"],
      },
      "sample.order",
    ),
    (
      "causal_estimator",
      {
        "model.mechanism": "causal",
        "orders.family": "left_to_right",
        "sample.order": "left_to_right",
      },
      "eval.estimators",
    ),
    ("no_estimator", {"eval.estimators": []}, "eval.estimators"),
    ("given_family", {"orders.family": "given"}, "orders.given"),
    ("given_sample", {"sample.order": "given"}, "orders.given"),
    ("given_estimator", {"eval.estimators": ["given_order"]}, "orders.given"),
    (
      "given_wrong",
      {"model.T": 3, "orders.given": [1, 2, 2], "orders.block_width": 1},
      "orders.given",
    ),
    ("given_from_0", {"model.T": 3, "orders.given": [0, 1, 2]}, "orders.given"),
    (
      "block",
      {"orders.family": "block", "orders.block_width": 129},
      "orders.block_width",
    ),
    (
      "blocks",
      {"orders.family": "shuffled_blocks", "orders.block_width": 129},
      "orders.block_width",
    ),
    ("accumulate", {"compute.accumulate": 5}, "compute.accumulate"),
    (
      "decay",
      {"optimizer.schedule": "stable_decay", "train.steps": 699},
      "optimizer.decay_steps",
    ),
    (
      "cudnn",
      {"compute.attention": "cudnn", "compute.dtype": "float32"},
      "compute.dtype",
    ),
    ("given_words", {"orders.given": ["a"]}, "orders.given"),
    ("elbo", {"eval.estimators": ["elbo"]}, "eval.estimators"),
    (
      "contexts",
      {"model.mechanism": "mdlm", "eval.estimators": ["context_ensembled"]},
      "eval.estimators",
    ),
    (
      "groups",
      {"model.mechanism": "ao_gpt", "orders.groups": "fixed"},
      "orders.groups",
    ),
    (
      "group_sizes",
      {"orders.groups": "given", "orders.group_sizes": [64, 63]},
      "orders.group_sizes",
    ),
    ("no_group", {"orders.groups": "given"}, "orders.group_sizes"),
    ("score_groups", {"score.width": 2}, "score.width"),
    (
      "queries",
      {"model.mechanism": "sigma_gpt", "train.query_fraction": 0.5},
      "train.query_fraction",
    ),
    ("masked_method", {"sample.method": "ancestral"}, "sample.method"),
    (
      "cached_method",
      {
        "model.mechanism": "mdlm",
        "eval.estimators": ["elbo"],
        "sample.method": "speculative",
      },
      "sample.method",
    ),
    (
      "causal_method",
      {
        "model.mechanism": "causal",
        "orders.family": "left_to_right",
        "sample.order": "left_to_right",
        "eval.estimators": ["left_to_right"],
        "sample.method": "adaptive",
      },
      "sample.method",
    ),
    (
      "unused_steps",
      {"sample.method": "adaptive", "sample.steps": 8},
      "sample.steps",
    ),
    ("match", {"match.by": "parameters"}, "match.change"),
    ("tune_lengths", {"study.tune_lengths": (128, 0)}, "study.tune_lengths"),
    ("long_blank", {"sample.blank": "__"}, "sample.blank"),
    (
      "study_of_bytes",
      {"study.sweep": "seed=0,1", "data.tokenizer": "byte"},
      "data.tokenizer",
    ),
    (
      "study_of_documents",
      {"study.sweep": "seed=0,1", "data.documents": "pad"},
      "data.documents",
    ),
    (
      "visible_length",
      {
        "model.mechanism": "mdlm",
        "eval.estimators": ["elbo"],
        "data.documents": "pad",
      },
      "model.sentinels",
    ),
    ("length", {"sample.length": 129}, "sample.length"),
  )
  def test_relation(self, changes, field):
    self.refuse(changes, field)

  @parameterized.parameters(
    ({"model.T": 3, "orders.given": [3, 1, 2], "orders.family": "given"},),
    ({"orders.family": "block", "orders.block_width": 128},),
    ({"compute.accumulate": 512},),
    ({"model.D": 2, "model.N": 1},),
    ({"orders.block_width": 500},),
    ({"optimizer.schedule": "stable_decay", "train.steps": 700},),
    ({"train.steps": 1},),
    ({"compute.attention": "cudnn"},),
    ({"model.positions": "learned", "model.shifted": True},),
    ({"model.mechanism": "mdlm", "eval.estimators": ["elbo"]} | _LEARNED,),
  )
  def test_what_may_be(self, changes):
    config = changed(changes)
    self.assertIs(config_rules.validate(config), config)

  def test_differences(self):
    old = config_lib.Config()
    new = changed(
      {
        "model.D": 64,
        "seed": 3,
        "train.steps": 7,
        "sample.seed": 9,
        "compute.remat": True,
        "data.path": "x",
        "name": "other",
        "data.tokenizer": "byte",
      },
    )
    model = [
      ("config.model.D", 256, 64),
      ("config.data.tokenizer", "char27", "byte"),
    ]
    self.assertCountEqual(config_rules.differences(old, new, ("model",)), model)
    self.assertCountEqual(
      config_rules.differences(old, new, ("model", "run")),
      [*model, ("config.seed", 0, 3), ("config.train.steps", 2000, 7)],
    )
    self.assertEmpty(list(config_rules.differences(new, new, ("", "run"))))


class ScheduleStepsTest(parameterized.TestCase):
  @parameterized.parameters(
    # schedule, steps then, steps now, checkpoint at, word of the refusal
    ("cosine", 100, 100, 50, ""),
    ("cosine", 100, 200, 50, "cosine"),
    ("cosine", 100, 90, 50, "cosine"),
    ("constant", 100, 200, 100, ""),
    ("constant", 100, 50, 20, ""),
    ("stable_decay", 100, 200, 69, ""),
    ("stable_decay", 100, 200, 70, ""),
    ("stable_decay", 100, 200, 71, "decay"),
    ("stable_decay", 100, 200, 100, "decay"),
    ("stable_decay", 200, 100, 70, ""),
    ("stable_decay", 200, 100, 71, "decay"),
  )
  def test_rule(self, schedule, then, now, step, refusal):
    def config(steps):
      return changed(
        {
          "optimizer.schedule": schedule,
          "optimizer.decay_steps": 30,
          "train.steps": steps,
        },
      )

    error = config_rules.schedule_steps_error(config(then), config(now), step)
    self.assertEqual(bool(error), bool(refusal), error)
    self.assertIn(refusal, error)
    self.assertNotIn("\n", error)


if __name__ == "__main__":
  absltest.main()
