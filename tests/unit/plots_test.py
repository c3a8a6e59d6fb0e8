"""The pictures of a study's report."""

from absl.testing import absltest

from aoarm_jax.study import plots


class MarkersTest(absltest.TestCase):
  def test_no_two_arms_look_alike(self):
    arms = ("ao_gpt", "ao_gpt, curriculum", "sigma_gpt", "adaln", "content")
    shades = ("blue", "blue", "red", "grey", "grey")
    items = [(arm, shade, "^") for arm, shade in zip(arms, shades)]
    marks = plots._markers(items * 2)
    self.assertEqual(list(marks), list(arms))
    looks = {(shade, marks[arm]) for arm, shade in zip(arms, shades)}
    self.assertLen(looks, len(arms))
    # What has its colour for itself keeps its marker.
    self.assertEqual(marks["sigma_gpt"], "^")


if __name__ == "__main__":
  absltest.main()
