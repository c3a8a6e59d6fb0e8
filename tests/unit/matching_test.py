"""Equal parameters, equal FLOPs."""

import dataclasses
import os
import re
import tempfile

import config_test
import pytest
from absl.testing import absltest, parameterized

from aoarm_jax.config import mechanisms
from aoarm_jax.config import schema as config_lib
from aoarm_jax.tools import matching


def _config(mechanism, by="training_flops", change="steps", **model):
  sizes = dict(T=64, D=64, L=3, N=2) | model
  return config_lib.Config(
    model=config_lib.Model(mechanism=mechanism, **sizes),
    train=config_lib.Train(steps=800, batch_size=64),
    match=config_lib.Match("other", by, change),
  )


class SymbolsTest(parameterized.TestCase):
  @parameterized.product(
    experiment=config_test.EXPERIMENTS, variant=("bpe", "124m")
  )
  @pytest.mark.thorough
  def test_the_sizes_that_a_file_names(self, experiment, variant):
    config = config_lib.from_config_dict(
      config_test.get_config(experiment, variant)
    )
    source = (config_test.CONFIGS / f"{experiment}.py").read_text()
    sizes = re.search(rf" :{variant} .*? ([\d.]+)M .*? ([\d.]+)M of", source)
    counts = matching.parameters(config), matching.symbol_parameters(config)
    self.assertEqual(sizes.groups(), tuple(f"{n / 1e6:.1f}" for n in counts))


class MatchTest(parameterized.TestCase):
  @parameterized.product(
    mechanism=("decoupled_rope", "ao_gpt", "mdlm"),
    by_and_change=(
      ("training_flops", "steps"),
      ("training_flops", "mlp_width"),
      ("parameters", "mlp_width"),
      ("training_flops", "D"),
      ("parameters", "L"),
    ),
  )
  def test_the_nearest_value_is_found(self, mechanism, by_and_change):
    """One more or one less is further away."""
    by, change = by_and_change
    sizes = dict(D=256, L=12, N=4)
    other = _config("two_stream", **sizes)
    own = _config(mechanism, by, change, **sizes)
    matched = matching.match(own, other)
    section = "train" if change == "steps" else "model"
    value = getattr(getattr(matched, section), change)
    unit = {"D": 32, "mlp_width": 8}.get(change, 1)
    self.assertEqual(value % unit, 0)

    def off(count):
      part = dataclasses.replace(getattr(own, section), **{change: count})
      changed = dataclasses.replace(own, **{section: part})
      if by == "parameters":
        sizes = (matching.parameters(c) for c in (changed, other))
      else:
        sizes = (matching.training_flops(c) for c in (changed, other))
      mine, wanted = sizes
      return abs(mine - wanted)

    self.assertLessEqual(off(value), off(value + unit))
    if value > unit:
      self.assertLessEqual(off(value), off(value - unit))
    # Nothing else has changed.
    back = dataclasses.replace(
      getattr(matched, section),
      **{change: getattr(getattr(own, section), change)},
    )
    self.assertEqual(dataclasses.replace(matched, **{section: back}), own)

  def test_itself(self):
    """What is equal already stays."""
    own = _config("ao_gpt", "parameters", "mlp_width")
    self.assertEqual(matching.match(own, own).model.mlp_width, 256)
    own = _config("ao_gpt")
    self.assertEqual(matching.match(own, own), own)

  def test_flops_of_a_run(self):
    one, two = _config("causal"), _config("causal", L=6)
    self.assertEqual(
      matching.training_flops(
        dataclasses.replace(
          one, train=config_lib.Train(steps=1600, batch_size=64)
        ),
      ),
      2 * matching.training_flops(one),
    )
    self.assertGreater(
      matching.training_flops(two), 1.9 * matching.training_flops(one)
    )

  def test_what_cannot_be_matched(self):
    large = _config("two_stream", D=512, L=1)
    own = _config("ao_gpt", "parameters", "mlp_width", D=2048, N=2)
    with self.assertRaisesRegex(
      config_lib.ConfigError, "config.match.change='mlp_width': .* has .* of"
    ):
      matching.match(own, large)
    # What is a fifth off is not equal.
    with self.assertRaisesRegex(config_lib.ConfigError, "no L gives ao_gpt"):
      few = _config("two_stream", L=3)
      matching.match(_config("ao_gpt", "parameters", "L"), few)

  @pytest.mark.thorough
  def test_table(self):
    table = matching.table(_config("two_stream")).splitlines()
    self.assertLen(table, 2 + len(mechanisms.MECHANISMS))
    self.assertLen(set(map(len, table)), 1)
    rows = {line.split()[0]: line.split() for line in table[2:]}
    count = matching.parameters(_config("two_stream"))
    self.assertEqual(rows["two_stream"][1], f"{count:,}")
    # BOS, EOS and MASK have embeddings, and no columns in the head.
    self.assertEqual(rows["two_stream"][2], f"{(27 + 2 + 27) * 64:,}")
    self.assertEqual(rows["mdlm"][2], f"{(27 + 3 + 27) * 64:,}")
    self.assertEqual(rows["two_stream"][-1], "800")
    self.assertEqual(rows["mdlm"][5], "0")

  @pytest.mark.thorough
  def test_table_where_nothing_comes_near(self):
    """One layer cannot become fewer."""
    table = matching.table(_config("two_stream", L=1)).splitlines()
    self.assertLen(table, 2 + len(mechanisms.MECHANISMS))
    rows = {line.split()[0]: line.split() for line in table[2:]}
    self.assertEqual(rows["ao_gpt"][6], "-")
    self.assertEqual(rows["decoupled_rope"][6], "1")

  @pytest.mark.thorough
  def test_table_of_a_fraction_of_the_queries(self):
    """Cheaper training for two streams, and nothing else for one."""
    whole = _config("two_stream")
    part = dataclasses.replace(
      whole, train=dataclasses.replace(whole.train, query_fraction=0.25)
    )
    table = matching.table(part).splitlines()
    rows = {line.split()[0]: line.split() for line in table[2:]}

    def passes(name):
      return float(rows[name][4]) / float(rows[name][3])

    self.assertLess(passes("two_stream"), 2.5)
    self.assertAlmostEqual(passes("causal"), 3.0, delta=0.1)
    # A cheaper run is matched by fewer steps than the 800.
    fraction = float(rows["two_stream"][4]) / float(rows["causal"][4])
    steps = int(rows["causal"][-1].replace(",", ""))
    self.assertAlmostEqual(steps, 800 * fraction, delta=12)


class ResolveTest(absltest.TestCase):
  def resolve(self, overrides=(), mechanism="two_stream", **match):
    """(config, matched config); `overrides`: {path: value}, as of flags."""
    more = ""
    if mechanism == "causal":
      way = "left_to_right"
      more = (
        f"orders={{'family': {way!r}}}, sample={{'order': {way!r}}}, "
        f"eval={{'estimators': ({way!r},)}}"
      )
    with tempfile.TemporaryDirectory() as folder:
      with open(os.path.join(folder, "other.py"), "w") as file:
        file.write(
          "from aoarm_jax.config import experiments\n"
          "def get_config(variant):\n"
          "  return experiments.experiment('other', variant,\n"
          f"    model={{'mechanism': {mechanism!r}}}, {more})\n"
        )
      config = dataclasses.replace(
        _config("decoupled_rope", D=256, L=10, N=4, T=128),
        train=config_lib.Train(),
        match=config_lib.Match(**match),
      )
      for path, value in dict(overrides).items():
        config = config.replace(path, value)
      return config, matching.resolve(
        config, os.path.join(folder, "own.py:default"), list(overrides)
      )

  def test_nothing_to_match(self):
    config, same = self.resolve()
    self.assertEqual(config, same)

  def test_the_variant_is_the_same_or_named(self):
    _, default = self.resolve(to="other")
    self.assertEqual(default.train.steps, 3511)
    _, half = self.resolve(to="other", steps=1000)
    self.assertEqual(half.train.steps, 1755)
    _, tiny = self.resolve(to="other:tiny", steps=20_000)
    self.assertLess(tiny.train.steps, 1000)

  def test_the_other_takes_the_values_of_the_command_line(self):
    """All that are not the mechanism: sizes, batch, steps, alphabet."""
    wide = {"model.D": 512, "model.mechanism": "decoupled_rope"}
    _, plain = self.resolve(to="other")
    config, matched = self.resolve(wide, to="other")
    self.assertEqual(matched.train.steps, self.expected_steps(config))
    self.assertAlmostEqual(
      matched.train.steps, plain.train.steps, delta=0.1 * plain.train.steps
    )
    small = {"train.batch_size": 64}
    _, matched = self.resolve(small, to="other")
    self.assertEqual(matched.train.steps, plain.train.steps)
    _, matched = self.resolve({"train.steps": 1000}, to="other")
    self.assertAlmostEqual(matched.train.steps, plain.train.steps / 2, delta=1)
    # The field of the match goes before the one of the command line.
    _, matched = self.resolve({"train.steps": 7}, to="other", steps=2000)
    self.assertEqual(matched.train.steps, plain.train.steps)
    by_size = dict(by="parameters", change="mlp_width")
    _, matched = self.resolve(
      {"data.tokenizer": "byte", "model.D": 64}, to="other", **by_size
    )
    self.assertEqual(matched.model.F, 256)

  def expected_steps(self, config):
    other = config.replace("model.mechanism", "two_stream")
    steps = matching.training_flops(other) / matching.training_flops(config)
    return round(steps * config.train.steps)

  def test_a_value_that_the_other_mechanism_does_not_allow_stays_away(self):
    fraction = {"train.query_fraction": 0.5, "orders.family": "block"}
    with self.assertLogs(level="INFO") as logs:
      _, matched = self.resolve(fraction, "causal", to="other")
    config, _ = self.resolve({}, "causal")
    self.assertLess(matched.train.steps, config.train.steps * 2)
    text = "\n".join(logs.output)
    self.assertIn("other keeps config.train.query_fraction=1.0", text)
    self.assertIn("other keeps config.orders.family='left_to_right'", text)

  def test_the_log_names_the_sizes_of_the_other(self):
    with self.assertLogs(level="INFO") as logs:
      self.resolve({"model.D": 512}, to="other:tiny")
    self.assertIn(
      "of other:tiny (T=64, D=512, L=3, N=2, F=2,048, batch_size=32, "
      "steps=2,400)",
      logs.output[-1],
    )

  def test_no_such_config(self):
    with self.assertRaisesRegex(
      config_lib.ConfigError,
      "config.match.to='another': there is no .*another.py: name a file in",
    ):
      self.resolve(to="another")
    with self.assertRaisesRegex(
      config_lib.ConfigError, r"this package; did you mean two_stream:tiny\?$"
    ):
      self.resolve(to="configs/two_stream.py:tiny")


if __name__ == "__main__":
  absltest.main()
