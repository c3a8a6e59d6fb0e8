"""Processes compare what they are about to do."""

import concurrent.futures
import pathlib
import tempfile
import threading
from unittest import mock

import jax
from absl.testing import absltest, parameterized
from etils import epath

from aoarm_jax.config import schema as config_lib
from aoarm_jax.devices import neighbours
from aoarm_jax.runs import agreement, checkpoint

COUNT = 3


class Store:
  """The key-value store of JAX's coordination service, for threads."""

  def __init__(self):
    self._values = {}
    self._changed = threading.Condition()
    self._is_closed = False

  def close(self):
    with self._changed:
      self._is_closed = True
      self._changed.notify_all()

  def key_value_set(self, key, value, allow_overwrite=False):
    with self._changed:
      if key in self._values and not allow_overwrite:
        raise jax.errors.JaxRuntimeError("ALREADY_EXISTS")
      self._values[key] = value
      self._changed.notify_all()

  def key_value_dir_get(self, folder):
    with self._changed:
      self._check()
      return [x for x in self._values.items() if x[0].startswith(folder)]

  def blocking_key_value_get(self, key, milliseconds):
    with self._changed:
      there = self._changed.wait_for(
        lambda: key in self._values or self._is_closed, milliseconds / 1000
      )
      self._check()
      if not there:
        raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
      return self._values[key]

  def _check(self):
    if self._is_closed:
      raise jax.errors.JaxRuntimeError("CANCELLED")


class State(threading.local):
  """jax._src.distributed.global_state; every thread is another process."""

  client: Store
  num_processes = COUNT
  process_id = 0


class Numbers(dict):
  """neighbours._calls, of every process."""

  def __init__(self, state):
    super().__init__()
    self._state = state

  def get(self, name, default):
    return super().get((self._state.process_id, name), default)

  def __setitem__(self, name, number):
    super().__setitem__((self._state.process_id, name), number)


class AgreementTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.state, self.store = State(), Store()
    self.enter_context(
      mock.patch.object(neighbours.runtime, "global_state", self.state)
    )
    self.enter_context(
      mock.patch.object(neighbours, "_calls", Numbers(self.state))
    )
    self.enter_context(mock.patch.object(agreement, "_DISK_SECONDS", 0.3))

  def folder(self):
    return self.enter_context(tempfile.TemporaryDirectory())

  def outcomes(self, check):
    """The errors of `check(process)` by process; None where it returns.

    JAX's client fails once a process has failed. Elsewhere the process would
    be ended then, see processes_test.py.
    """

    def run(process):
      self.state.process_id, self.state.client = process, self.store
      try:
        check(process)
      except Exception as error:
        self.store.close()
        return error
      return None

    with concurrent.futures.ThreadPoolExecutor(COUNT) as pool:
      return list(pool.map(run, range(COUNT)))

  def assert_agreed(self, check):
    self.assertEqual(self.outcomes(check), [None] * COUNT)

  def assert_refused(self, check, process, *words):
    """`process` says what differs, and no process goes on."""
    errors = self.outcomes(check)
    self.assertNotIn(None, errors)
    self.assertIsInstance(errors[process], config_lib.ConfigError)
    self.assertLen(str(errors[process]).splitlines(), 1)
    for word in (f"process {process} ", *words):
      self.assertIn(word, str(errors[process]))

  def command(self, words=None, **changes):
    """Checks the command, with changed fields and words in process 2."""

    def check(process):
      config, given = config_lib.Config(), {"prompt": "a"}
      if process == 2:
        given |= words or {}
        for path, value in changes.items():
          config = config.replace(path.replace("__", "."), value)
      agreement.check_command(config, given)

    return check

  def test_the_same(self):
    self.assert_agreed(self.command())

  def test_again(self):
    """The same things may be compared several times."""
    check, folder = self.command(), epath.Path(self.folder())

    def both(process):
      for _ in range(2):
        check(process)
        agreement.check_disk(folder, writes=True)

    self.assert_agreed(both)

  def test_what_may_differ(self):
    """The place of the text, and the place of the process itself."""
    self.assert_agreed(
      self.command(data__path="elsewhere", distributed__process_id=2)
    )

  @parameterized.parameters(
    ({"seed": 1}, "config.seed is 1, and it is 0 in process 0"),
    ({"data__corpus": "books"}, "config.data.corpus is 'books'"),
    (
      {"optimizer__peak_learning_rate": 0.5},
      "config.optimizer.peak_learning_rate is 0.5",
    ),
    ({"words": {"prompt": "b\nc"}}, r"--prompt is 'b\nc', and it is 'a'"),
    ({"words": {"text": "b"}}, "--text is 'b', and it is absent in process 0"),
  )
  def test_another_command(self, changes, text):
    self.assert_refused(self.command(**changes), 2, text)

  def test_other_code(self):
    ours = agreement._source_hash()

    def source_hash():
      return "other" if self.state.process_id == 1 else ours

    with mock.patch.object(agreement, "_source_hash", source_hash):
      self.assert_refused(
        self.command(),
        1,
        f"the source code of aoarm_jax (sha256) is other, and it is {ours}",
      )

  @parameterized.parameters("jax", "optax")
  def test_another_version(self, library):
    def version(name):
      return "9" if (name, self.state.process_id) == (library, 1) else "1"

    with mock.patch.object(agreement, "_version", version):
      self.assert_refused(self.command(), 1, f"the version of {library} is 9")

  def test_another_number_of_devices(self):
    def devices():
      count = 2 if self.state.process_id == 2 else 1
      return [mock.Mock(device_kind="cpu")] * count

    with mock.patch("jax.local_devices", devices):
      self.assert_refused(
        lambda _: agreement.check_devices(),
        2,
        "the number of devices is 2, and it is 1 in process 0",
      )

  def test_another_text(self):
    self.assert_refused(
      lambda process: agreement.check_text({"train": str(process // 2) * 64}),
      2,
      "the train text (sha256) is 111111111111, and it is 000000000000",
    )

  def test_other_prompts(self):
    self.assert_refused(
      lambda process: agreement.check_lines(
        [("", "b" if process == 1 else "a")]
      ),
      1,
      "the input (sha256)",
    )

  @parameterized.parameters(
    (4, 1, "the checkpoint's step is 4, and it is 3 in process 0"),
    (None, 1, "the checkpoint's step is None, and it is 3"),
    (3, 2, "the manifest of the checkpoint (sha256)"),
  )
  def test_another_checkpoint(self, step, size, text):
    """Another step, no step, and the same step with another file."""

    def check(process):
      steps, sizes = (3, step, 3), (1, size, 1)
      saved = checkpoint.Saved(steps[process] or 0, "", {}, None)
      files = {"a": {"bytes": sizes[process]}}
      agreement.check_checkpoint(
        mock.Mock(files=lambda step: files), saved if saved.step else None
      )

    self.assert_refused(check, 1, text)

  @parameterized.parameters(True, False)
  def test_a_shared_disk(self, writes):
    folder = epath.Path(self.folder())
    self.assert_agreed(lambda _: agreement.check_disk(folder, writes=writes))
    self.assertEmpty(list(folder.iterdir()))

  def test_a_run_that_is_not_there_is_not_made(self):
    folder = epath.Path(self.folder()) / "none"
    self.assert_agreed(lambda _: agreement.check_disk(folder, writes=False))
    self.assertFalse(folder.exists())

  @parameterized.parameters("empty", "stale", "absent")
  def test_a_disk_that_is_not_shared(self, what):
    folder = pathlib.Path(self.folder())
    (folder / "0").mkdir()
    if what != "absent":
      (folder / "1").mkdir()
    if what == "stale":  # From an earlier start.
      (folder / "1" / ".shared").write_text("old")
    self.assert_refused(
      lambda process: agreement.check_disk(
        epath.Path(folder / str(int(process == 1))), writes=True
      ),
      1,
      f"--workdir={folder}/1: cannot read the file .shared that process 0",
      "shared disk",
    )

  def test_alone_nothing_is_compared(self):
    self.state.client = None
    agreement.check_command(config_lib.Config(), {})
    agreement.check_devices()
    agreement.check_text({})


if __name__ == "__main__":
  absltest.main()
