"""Three steps of training of every mechanism, against numbers kept in a file.

A change of the loss, the gradient, clipping, decay or the update shows here,
also one that no property test sees. If it is meant, make the file anew, or, for
a new mechanism, add its numbers to the file:

  PYTHONPATH=tests python tests/numerics/golden_test.py --write
  PYTHONPATH=tests python tests/numerics/golden_test.py --add
"""

import json
import pathlib
import sys
import tempfile
from unittest import mock

import helpers
import jax
import numpy as np
import pytest
import tiny
from absl.testing import absltest, parameterized

from aoarm_jax.config import mechanisms
from aoarm_jax.config import schema as config_lib
from aoarm_jax.devices import sharding
from aoarm_jax.training import program as program_lib

_FILE = pathlib.Path(__file__).with_name("golden_numbers.json")
_B, _T, _STEPS = 4, 8, 3
# Nats. jax 0.10 and 0.12 differ by 5e-7 here, which is two roundings. Other
# processors add in another order, and Adam divides small gradients.
_TOLERANCE = 2e-5


def numbers(mechanism: str) -> list[list[float]]:
  """Nats per token, gradient norm and update norm of each of three steps.

  On fixed tokens, from seed 0. Gradients are clipped and weights decay, so that
  both show in the update.
  """
  kind = mechanisms.MECHANISMS[mechanism]
  family = "left_to_right" if kind.left_to_right else "uniform"
  config = config_lib.Config(
    model=config_lib.Model(mechanism=mechanism, T=_T, D=16, L=2, N=2),
    orders=config_lib.Orders(family=family),
    optimizer=config_lib.Optimizer(
      warmup_steps=0, peak_learning_rate=1e-2, clip_norm=0.3, weight_decay=1.0
    ),
    train=config_lib.Train(batch_size=_B, steps=_STEPS),
    compute=config_lib.Compute(dtype="float32", attention="xla"),
    mesh=config_lib.Mesh(data=1),
  )
  program = program_lib.make(config, "train")
  mesh = program.network.mesh
  with jax.set_mesh(mesh):
    state, rows = program.init(np.int32(0)), []
    for step in range(_STEPS):
      tokens = tiny.tokens(_B, _T, 27, seed=step).astype(np.uint8)
      state, sums = program.step(state, sharding.put_batch(mesh, tokens))
      rows.append(
        [
          float(sums["nats"] / sums["tokens"]),
          float(sums["gradient_norm"]),
          float(sums["update_norm"]),
        ]
      )
  return rows


def write(file: pathlib.Path, kept: dict[str, list]) -> None:
  """Writes the numbers of all mechanisms; those in `kept` are not computed."""
  made = {
    name: kept.get(name) or numbers(name) for name in mechanisms.MECHANISMS
  }
  file.write_text(json.dumps(made, indent=1) + "\n")


# One stream, one of both kinds of rows in one, and a masked one.
_KINDS = ("decoupled_rope", "ao_gpt", "mdlm")


class GoldenTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enter_context(helpers.quick_compilation())

  def test_every_mechanism_is_in_the_file(self):
    self.assertSetEqual(
      set(json.loads(_FILE.read_text())),
      set(mechanisms.MECHANISMS),
      "for a new mechanism: PYTHONPATH=tests python "
      "tests/numerics/golden_test.py --add",
    )

  def test_a_new_mechanism_is_added_and_no_other_number_changes(self):
    kept = {"two_stream": [1.0, 2.0, 3.0], "gone": [1.0]}
    file = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()), "x")
    file.write_text(json.dumps(kept))
    new = {name: mechanisms.MECHANISMS[name] for name in ("two_stream", "mdlm")}
    with (
      mock.patch.object(mechanisms, "MECHANISMS", new),
      mock.patch(f"{__name__}.numbers", return_value=[7.0]),
    ):
      write(file, kept)
      self.assertEqual(
        json.loads(file.read_text()),
        {"two_stream": kept["two_stream"], "mdlm": [7.0]},
      )
      write(file, {})
    self.assertEqual(
      json.loads(file.read_text()), {"two_stream": [7.0], "mdlm": [7.0]}
    )

  def test_numbers_of_two_streams(self):
    self.check_numbers("two_stream")

  @parameterized.parameters(*_KINDS)
  @pytest.mark.thorough
  def test_numbers(self, mechanism):
    self.check_numbers(mechanism)

  @parameterized.parameters(
    *sorted({*mechanisms.MECHANISMS} - {"two_stream", *_KINDS})
  )
  @pytest.mark.slow
  def test_numbers_of_more_mechanisms(self, mechanism):
    self.check_numbers(mechanism)

  def check_numbers(self, mechanism):
    want = json.loads(_FILE.read_text())[mechanism]
    np.testing.assert_allclose(numbers(mechanism), want, atol=_TOLERANCE)


if __name__ == "__main__":
  if sys.argv[1:] == ["--write"]:
    write(_FILE, {})
  elif sys.argv[1:] == ["--add"]:
    write(_FILE, json.loads(_FILE.read_text()))
  else:
    absltest.main()
