"""One table of exit codes: the program, and every launcher's reading of it."""

import itertools
import pathlib
import subprocess

from absl.testing import absltest, parameterized

from aoarm_jax.config import exit_codes
from launch import common, gke, local

DOCS = pathlib.Path(__file__).resolve().parents[2] / "docs"
# The code, and whether the same command is started again.
CODES = {
  0: False,
  1: False,
  2: False,
  3: False,
  14: True,  # Stuck.
  75: True,  # Preempted.
  76: True,  # Another process was lost.
  126: False,  # The command cannot be started.
  127: False,
  128: False,
  129: True,  # SIGHUP
  130: False,  # SIGINT
  131: True,
  134: True,  # SIGABRT
  137: True,  # SIGKILL
  139: True,  # SIGSEGV
  142: True,  # SIGALRM
  143: True,  # SIGTERM
  199: True,
  255: True,
}


def verdicts(*starts):
  """The shell function of the launchers judges the codes of starts."""
  lines = "".join(
    f"verdict <<< '{chr(10).join(map(str, codes))}'\n" for codes in starts
  )
  out = subprocess.check_output(
    ["bash", "-c", common.verdict_function() + lines], text=True
  )
  return [line.split() for line in out.splitlines()]


class ExitCodesTest(parameterized.TestCase):
  def test_python_and_shell_agree_on_a_code(self):
    answers = verdicts(*([code] for code in CODES))
    for (code, again), (word, said) in zip(CODES.items(), answers, strict=True):
      self.assertEqual(exit_codes.is_restartable(code), again, code)
      want = "again" if again else "end" if code else "done"
      self.assertEqual((word, int(said)), (want, code))

  def test_all_agree_on_the_cause(self):
    pairs = list(itertools.combinations((0, 1, 2, 14, 75, 76, 137, 143), 2))
    for codes, (_, said) in zip(pairs, verdicts(*pairs), strict=True):
      cause = exit_codes.cause(codes)
      self.assertEqual(int(said), cause, codes)
      self.assertEqual(exit_codes.cause(codes[::-1]), cause, codes)
      self.assertEqual(local._first_failure(codes)[1], cause, codes)

  @parameterized.parameters(
    # A neighbour's abort never hides what cannot be mended by a restart.
    ([2, 134], 2),
    ([139, 1], 1),
    ([3, 76, 143], 3),
    ([1, 75], 1),
    # The neighbours of a killed process fail in their own ways.
    ([76, 137, 134], 137),
    ([1, 137], 137),
    ([137, 2], 2),
    ([76, 14], 14),
    ([0, 76], 76),
    ([0, 0], 0),
  )
  def test_the_cause_wins(self, codes, cause):
    self.assertEqual(exit_codes.cause(codes), cause)

  def test_a_return_code_of_a_signal(self):
    self.assertEqual(exit_codes.of_return_code(-9), 137)
    self.assertEqual(exit_codes.of_return_code(75), 75)

  def test_kubernetes_ends_after_no_restartable_code(self):
    ends = gke._permanent()
    self.assertEqual([c for c in ends if exit_codes.is_restartable(c)], [])
    self.assertContainsSubset([1, 2, 130], ends)

  @parameterized.parameters("launching.md", "running.md")
  def test_the_pages_name_every_code(self, page):
    text = (DOCS / page).read_text()
    for code in (1, 2, 14, 75, 76, 130):
      self.assertRegex(text, rf"(?m)^\|[^|]*\b{code}\b[^|]*\|", code)


if __name__ == "__main__":
  absltest.main()
