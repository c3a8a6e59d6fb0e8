"""Measures of kept weights: windows, plans, tables and what is read again."""

import tempfile
from unittest import mock

import jax.numpy as jnp
import numpy as np
from absl.testing import absltest
from etils import epath
from studies import V, config

from aoarm_jax.config import schema as config_lib
from aoarm_jax.data import corpora
from aoarm_jax.study import cells as cells_lib
from aoarm_jax.study import dissection, instruments, measure


def tiny(**study):
  plain = config("seed=0", measure_windows=3, **study)
  return plain.replace("model.T", 5).replace("model.L", 3)


class WindowsTest(absltest.TestCase):
  def test_probes_are_fitted_on_other_windows(self):
    tokens = np.random.default_rng(0).integers(0, V, 5 * 40).astype(np.uint8)
    fit, held = instruments.windows(tiny(), tokens)
    self.assertEqual(fit.tokens.shape, (9, 5))
    self.assertEqual(held.tokens.shape, (3, 5))
    rows = {tuple(row) for row in tokens.reshape(40, 5)}
    used = [tuple(row) for row in np.concatenate([fit.tokens, held.tokens])]
    self.assertLen(set(used), 12)
    self.assertLessEqual(set(used), rows)
    for row in held.order:
      np.testing.assert_array_equal(np.sort(row), np.arange(1, 6))
    with mock.patch.object(instruments, "_MOST_TOKENS", 20):
      batches = list(fit.batches())
    self.assertEqual([first for first, *_ in batches], [0, 3, 6])
    np.testing.assert_array_equal(
      np.concatenate([tokens for _, tokens, _ in batches]), fit.tokens
    )

  def test_a_text_that_is_too_short_is_refused(self):
    with self.assertRaisesRegex(
      corpora.DataError, "12 windows of T=5 are needed.*has 10; take at most 2"
    ):
      instruments.windows(tiny(), np.zeros(50, np.uint8))


class PlansTest(absltest.TestCase):
  def test_every_layer_and_stream_that_something_reads(self):
    options = tiny(knockouts="own", layer_knockouts="last:2")
    plans = list(instruments._plans(options, ("content", "query")))
    self.assertEqual(
      [(plan.text, plan.stream, plan.layer) for plan in plans],
      [
        *(("own", name, "all") for name in ("content", "query", "all")),
        *(("last:2", "content", layer) for layer in "12"),
        *(("last:2", "query", layer) for layer in "123"),
      ],
    )
    np.testing.assert_array_equal(
      plans[2].active, [[True, True], [True, True], [False, True]]
    )
    self.assertEqual([plan.active.sum() for plan in plans[3:]], [1] * 5)
    (one, *_) = instruments._plans(options, ("only",))
    self.assertEqual((one.stream, one.active.shape), ("only", (3, 1)))
    self.assertTrue(one.active.all())


class TableTest(absltest.TestCase):
  def test_characters_beyond_what_the_own_token_tells(self):
    right = {1: ([2, 2], [6, 10]), 2: ([4, 4], [4, 4])}  # Before, after.
    found = {
      "probes": [
        {
          "by": "recency",
          "offset": r,
          "layer": layer,
          "right": right[r][layer],
          "seen": [10, 10],
        }
        for r in (1, 2)
        for layer in (0, 1)
      ]
    }
    rows = list(dissection._probe_rows(found))
    self.assertAlmostEqual(rows[1]["accuracy"], 0.8)
    self.assertAlmostEqual(rows[1]["above_own_token"], 0.6)
    self.assertAlmostEqual(rows[1]["above_own_token_error"], 0.2)
    before, after = dissection._character_rows(found)
    self.assertEqual((before["characters"], before["layer"]), (0, 0))
    self.assertAlmostEqual(after["characters"], 0.6 / 0.8)
    self.assertEqual((after["offsets"], after["probes"]), ("1 to 8", 2))

  def test_rises_have_errors_over_windows(self):
    row = {"knockout": "own", "stream": "only", "layer": "all", "mass": [0.1]}
    rises = {"rise_bits": [1, 2], "late_bits": [0, 0]}
    found = {"bits": [2.0, 4.0], "knockouts": [row | rises]}
    (row,) = dissection._knockout_rows(found)
    self.assertEqual((row["rise_bits"], row["rise_bits_error"]), (1.5, 0.5))
    self.assertEqual((row["intact_bits"], row["windows"]), (3, 2))


class FilesTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.enter_context(tempfile.TemporaryDirectory())
    self.folder = epath.Path(folder)
    self.result = {"files": {measure.WEIGHTS: "0"}}

  def test_weights_come_back_in_bfloat16(self):
    params = {"a": {"b": jnp.array([1.0, 1.001953125])}, "c": jnp.ones(())}
    data = measure._weights(params)
    (self.folder / measure.WEIGHTS).write_bytes(data)
    result = {"files": {measure.WEIGHTS: measure._hash(data)}}
    again = measure.read_weights(self.folder, result, params)
    self.assertEqual(again["a"]["b"].dtype, jnp.float32)
    np.testing.assert_array_equal(again["a"]["b"], [1.0, 1.0])
    for other in ({"d": jnp.ones(2)}, {"c": jnp.ones(1)}):
      with self.assertRaisesRegex(corpora.DataError, "is missing or other"):
        measure.read_weights(self.folder, result, other)

  def write(self, **changes):
    record = {
      "options": dissection._options(tiny()),
      "weights": "0",
      "bits": [],
      "knockouts": [],
      "probes": [],
      "locality": [],
    }
    text = dissection.disk.to_json(record | changes)
    (self.folder / dissection.MEASURES).write_text(text)

  def test_only_measures_of_these_options_and_weights_count(self):
    self.assertIsNone(dissection._read(self.folder, self.result, tiny()))
    self.write()
    self.assertIsNotNone(dissection._read(self.folder, self.result, tiny()))
    other = tiny(knockouts="own")
    self.assertIsNone(dissection._read(self.folder, self.result, other))
    self.write(weights="1")
    self.assertIsNone(dissection._read(self.folder, self.result, tiny()))
    (self.folder / dissection.MEASURES).write_text("{")
    with self.assertRaisesRegex(corpora.DataError, "damaged.*delete it"):
      dissection._read(self.folder, self.result, tiny())

  def test_what_cannot_be_measured_is_refused(self):
    study = tiny(layer_knockouts="near:2")
    results = mock.Mock(workdir=self.folder)
    results.result.return_value = None
    cells = cells_lib.expand(study)
    with self.assertRaisesRegex(config_lib.ConfigError, "'near:2' is none of"):
      dissection.run(study, cells, results)
    with self.assertRaisesRegex(config_lib.ConfigError, "no cell.*has weights"):
      dissection.run(tiny(), cells, results)


if __name__ == "__main__":
  absltest.main()
