"""Errors of connections are told from other errors."""

import os
import sys
from unittest import mock

import jax
from absl.testing import absltest, parameterized

from aoarm_jax.config import schema as config_lib
from aoarm_jax.devices import distributed, neighbours

LOST = (
  "UNKNOWN: Gloo all-reduce failed: [external/gloo/gloo/transport/tcp/pair.cc:5"
  "38] Read error [127.0.0.1]:43711: Connection reset by peer",
  "INTERNAL: NCCL operation ncclGroupEnd() failed: remote process exited or "
  "there was a network error. Last NCCL warning(error) log entry (may be "
  "unrelated) 'socketProgress: Connection closed by remote peer'.",
  "INTERNAL: NCCL operation ncclAllReduce(...) failed: unhandled system error",
  "DEADLINE_EXCEEDED: Barrier timed out. Id: [Init]::1",
  "INTERNAL: Barrier failed because: The following tasks are unhealthy "
  "(stopped sending heartbeats): 1",
  "UNAVAILABLE: Socket closed\nAdditional GRPC error information from remote "
  "target coordination_service while calling /xla.coordination."
  "CoordinationService/PollForError:",
)
OTHERS = (
  "RESOURCE_EXHAUSTED: Out of memory allocating 80000000000 bytes.",
  "INTERNAL: CUDA error: an illegal memory access was encountered",
  "UNAVAILABLE: TPU initialization failed: open(/dev/accel0): Operation not "
  "permitted",
  "INVALID_ARGUMENT: Argument does not match host shape",
)


class NeighboursTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.client = mock.Mock()
    self.client.key_value_dir_get.return_value = []
    state = mock.Mock(client=self.client, num_processes=2, process_id=1)
    self.enter_context(
      mock.patch.object(neighbours.runtime, "global_state", state)
    )
    self.enter_context(mock.patch.object(neighbours, "_CAUSE_SECONDS", 0.2))

  def blamed(self, error):
    """The error that the program makes of an error of a computation."""
    with (
      self.assertRaises(Exception) as caught,
      distributed.blaming_neighbours(),
    ):
      raise error
    return caught.exception

  @parameterized.parameters(*LOST)
  def test_a_lost_neighbour_is_restartable(self, text):
    error = self.blamed(jax.errors.JaxRuntimeError(text))
    self.assertIsInstance(error, neighbours.NeighbourError)
    self.assertEqual(error.exit_code, 76)
    self.assertLen(str(error).splitlines(), 1)
    self.assertIn("process 1 lost a neighbour", str(error))
    self.assertIn(text.splitlines()[0], str(error))

  def test_the_types_of_the_error(self):
    """JAX raises ValueError at times; a save raises its own error from it."""
    self.assertIsInstance(
      self.blamed(ValueError(LOST[0])), neighbours.NeighbourError
    )
    wrapped = config_lib.ConfigError("the save failed")
    wrapped.__cause__ = jax.errors.JaxRuntimeError(LOST[3])
    self.assertIsInstance(self.blamed(wrapped), neighbours.NeighbourError)

  @parameterized.parameters(*map(jax.errors.JaxRuntimeError, OTHERS))
  def test_other_errors_stay(self, error):
    self.assertIs(self.blamed(error), error)

  def test_a_message_of_ours_is_no_lost_neighbour(self):
    error = config_lib.ConfigError(
      "config.distributed.heartbeat_timeout_seconds=0: must be at least 1"
    )
    self.assertIs(self.blamed(error), error)

  def test_the_cause_is_what_another_process_said(self):
    self.client.key_value_dir_get.return_value = [
      ("aoarm_jax/failure/first", '[0, 2, "no text"]')
    ]
    error = self.blamed(jax.errors.JaxRuntimeError(LOST[0]))
    self.assertEqual(str(error), "process 0 failed: no text")
    self.assertEqual(error.exit_code, 2)

  def test_alone_there_is_no_neighbour(self):
    error = jax.errors.JaxRuntimeError(LOST[0])
    with mock.patch.object(neighbours.runtime.global_state, "num_processes", 1):
      self.assertIs(self.blamed(error), error)


class FailingTest(absltest.TestCase):
  def test_ctrl_c_is_told_by_its_name(self):
    """The others cannot know what exit code 130 means."""
    told = mock.Mock(return_value=neighbours.Failure(0, 130, "x"))
    with (
      mock.patch.object(neighbours, "several", return_value=True),
      mock.patch.object(neighbours, "tell", told),
      mock.patch.object(os, "_exit", side_effect=SystemExit) as ends,
      self.assertRaises(SystemExit),
      distributed.failing_at_once(),
    ):
      try:
        raise KeyboardInterrupt
      except KeyboardInterrupt:
        sys.exit(130)
    told.assert_called_once_with(130, "interrupted by Ctrl-C")
    ends.assert_called_once_with(130)


if __name__ == "__main__":
  absltest.main()
