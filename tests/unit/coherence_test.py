"""Coherence and diversity of text made by hand."""

import numpy as np
from absl.testing import absltest, parameterized

from aoarm_jax.data import tokenizers
from aoarm_jax.study import coherence

CHAR27 = tokenizers.get("char27")


def reference(text=b"the cat sat on the mat with a hat", n=3):
  return coherence.reference(CHAR27.encode(text), text, n)


def measured(*texts, **kwargs):
  rows = [
    coherence.count(CHAR27.encode(text), text, reference(**kwargs))
    for text in texts
  ]
  return dict(zip(coherence.MEASURES, coherence.measures(np.array(rows))))


class CoherenceTest(parameterized.TestCase):
  def test_rules(self):
    # Two letters or more: the, dog, sat, with, wita. Four: with, wita.
    got = measured(b"the dog sat a with wita")
    self.assertAlmostEqual(got["coherence_over_1"], 3 / 5)
    self.assertAlmostEqual(got["coherence_from_4"], 1 / 2)

  def test_diversity_is_a_mean_over_samples_and_coherence_is_pooled(self):
    got = measured(b"the the the the", b"xx yy")
    self.assertAlmostEqual(got["diversity"], (1 / 4 + 1) / 2)
    self.assertAlmostEqual(got["coherence_over_1"], 4 / 6)

  def test_text_of_the_reference_is_familiar_and_repetition_is_seen(self):
    got = measured(b"the mat with")
    self.assertEqual(got["familiarity"], 1)
    self.assertEqual(got["repetition"], 0)
    got = measured(b"zzzzzz")  # Four 3-grams, one distinct, none known.
    self.assertEqual(got["familiarity"], 0)
    self.assertAlmostEqual(got["repetition"], 3 / 4)

  def test_no_words_at_all(self):
    got = measured(b"     ")
    self.assertTrue(np.isnan(got["coherence_from_4"]))
    self.assertEqual(got["diversity"], 0)

  def test_shorter_than_an_ngram(self):
    got = measured(b"ab")
    self.assertTrue(np.isnan(got["familiarity"]))

  @parameterized.parameters(
    ([1.0], [1.0], 1.0),
    ([0.5, 1.0], [1.0, 0.5], 0.75),
    ([0.5, 1.0, 0.4], [1.0, 0.5, 0.4], 0.75),  # The last is dominated.
    ([np.nan, 0.5], [1.0, 0.5], 0.25),
    ([], [], 0.0),
  )
  def test_dominated_area(self, x, y, area):
    self.assertAlmostEqual(
      coherence.dominated_area(np.array(x), np.array(y)), area
    )

  def test_areas_over_two_temperatures(self):
    counts = [
      [coherence.count(CHAR27.encode(text), text, reference())]
      for text in (b"with with mats", b"with mats catz")
    ]
    # Diversity and coherence are 2/3 and 2/3, then 1 and 1/3.
    areas = coherence.areas(np.array(counts))
    self.assertEqual(list(areas), ["area_over_1", "area_from_4"])
    np.testing.assert_allclose(list(areas.values()), 1 / 3 + 2 / 3 * 1 / 3)


if __name__ == "__main__":
  absltest.main()
