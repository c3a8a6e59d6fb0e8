"""The processes of a run meet, or all of them learn why they do not."""

import concurrent.futures
import contextlib
import socket
import time
from unittest import mock

from absl.testing import absltest, parameterized

from aoarm_jax.config import schema as config_lib
from aoarm_jax.devices import rendezvous

Failure = rendezvous.Failure


# Bytes that others may send to the port of process 0.
STRANGERS = (
  *(b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b""),
  b'{"aoarm_jax": "hello"}\n',
  b'{"aoarm_jax": "hello", "process": "1", "count": 2, "failure": null}\n',
  b'{"aoarm_jax": "hello", "process": true, "count": 2, "failure": null}\n',
  b'{"aoarm_jax": "hello", "process": 1, "count": 2, "failure": [1]}\n',
  b'{"aoarm_jax": "hello", "process": 1, "count": 2, "failure": {"a": 1}}\n',
)


def free_port():
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


def outcomes(*guests, port=None, seconds=20):
  """The errors of `meet` by process; None where it returns.

  Args:
    *guests: {process, count, failure} of each process, as far as not obvious.
    port: of process 0.
    seconds: the longest wait.
  """
  address = f"127.0.0.1:{port or free_port()}"

  def meet(k):
    fields = {"process": k, "count": len(guests), "failure": None} | guests[k]
    try:
      rendezvous.meet(address, seconds=seconds, **fields)
    except Exception as error:
      return error
    return None

  with concurrent.futures.ThreadPoolExecutor(len(guests)) as pool:
    return list(pool.map(meet, range(len(guests))))


class RendezvousTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    for name, seconds in {
      "_PORT_SECONDS": 0.2,
      "_ANSWER_SECONDS": 0.3,
      "_STRANGER_SECONDS": 0.5,
      "_TELL_SECONDS": 1.0,
      "_RETRY_SECONDS": 0.05,
    }.items():
      self.enter_context(mock.patch.object(rendezvous, name, seconds))
    # JAX's server, which they wait for in the end, does not come here.
    self.enter_context(mock.patch.object(rendezvous, "_until_it_listens"))

  def assert_all(self, errors, kind, exit_code, *words):
    for error in errors:
      self.assertIsInstance(error, kind)
      self.assertEqual(error.exit_code, exit_code)
      self.assertLen(str(error).splitlines(), 1)
      for word in words:
        self.assertIn(word, str(error))

  def test_they_meet(self):
    self.assertEqual(outcomes({}, {}, {}), [None, None, None])

  def test_one_process_meets_nobody(self):
    self.assertEqual(outcomes({}), [None])

  @parameterized.parameters(0, 1, 2)
  def test_a_failure_reaches_the_others(self, k):
    """A process that has failed already is told nothing itself."""
    guests = [{}, {}, {}]
    guests[k] = {"failure": Failure(k, 2, "no text")}
    errors = outcomes(*guests)
    self.assertIsNone(errors.pop(k))
    self.assert_all(
      errors, rendezvous.NeighbourError, 2, f"process {k} failed: no text"
    )

  def test_all_fail_early(self):
    self.assertEqual(
      outcomes(*({"failure": Failure(k, 2, "no text")} for k in range(3))),
      [None, None, None],
    )

  def test_another_number_of_processes(self):
    self.assert_all(
      outcomes({}, {"count": 3}),
      rendezvous.NeighbourError,
      2,
      "AOARM_PROCESS_COUNT",
      "3 in process 1 and 2 in process 0",
    )

  def test_the_same_number_twice(self):
    self.assert_all(
      outcomes({}, {}, {"process": 1}),
      rendezvous.NeighbourError,
      2,
      "config.distributed.process_id=1",
      "several processes",
    )

  def test_one_does_not_come(self):
    errors = outcomes({"count": 3}, {"count": 3}, seconds=1)
    self.assert_all(
      errors,
      rendezvous.NeighbourError,
      76,
      "process 2 of 3 did not come",
      "within 1 s",
      "initialization_timeout_seconds",
    )

  def test_many_do_not_come(self):
    (error,) = outcomes({"count": 2**40}, seconds=0.1)
    self.assertStartsWith(str(error), "process 1, 2, 3, ")
    self.assertIn(", 16, ... of 1099511627776 did not come", str(error))

  def test_process_0_does_not_come(self):
    errors = outcomes({"process": 1, "count": 2}, {"count": 2}, seconds=0.5)
    self.assert_all(
      errors,
      rendezvous.NeighbourError,
      76,
      "process 1 did not reach process 0 within 0.5 s",
      "Connection refused",
    )

  def test_the_port_is_in_use(self):
    """Process 0 says so, and the other one does not join a stranger."""
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as stranger:
      port = stranger.getsockname()[1]
      first, second = outcomes({}, {}, port=port)
    address = f"config.distributed.coordinator_address=127.0.0.1:{port}"
    words = (address, "another program", "choose another port")
    self.assert_all([first], config_lib.ConfigError, 2, *words)
    self.assert_all([second], rendezvous.NeighbourError, 76, *words)

  def test_an_earlier_start_is_still_ending(self):
    """Its server speaks HTTP/2. Process 0 listens as soon as it is gone."""
    port = free_port()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
      with socket.create_server(("127.0.0.1", port)) as former:
        guest = pool.submit(rendezvous.meet, f"127.0.0.1:{port}", 2, 1, 20)
        for _ in range(3):  # Longer than another program is waited for.
          with former.accept()[0] as connection:
            connection.sendall(b"\0\0\x12\4\0\0\0\0\0")
            time.sleep(0.3)
      rendezvous.meet(f"127.0.0.1:{port}", 2, 0, 20)
      self.assertIsNone(guest.result())

  def test_strangers_do_not_count(self):
    """Whoever looks at the port of process 0, such as a health check."""
    port = free_port()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
      host = pool.submit(rendezvous.meet, f"127.0.0.1:{port}", 2, 0, 20)
      for line in STRANGERS:
        while True:
          with contextlib.suppress(ConnectionRefusedError):
            stranger = socket.create_connection(("127.0.0.1", port))
            break
        with stranger:
          stranger.sendall(line)
      rendezvous.meet(f"127.0.0.1:{port}", 2, 1, 20)
      self.assertIsNone(host.result())


class AddressTest(parameterized.TestCase):
  @parameterized.parameters("a:1", "[::1]:65535", "10.0.0.1:8476")
  def test_an_address(self, text):
    self.assertTrue(rendezvous.is_address(text))

  @parameterized.parameters("a", ":1", "a:", "a:0", "a:65536", "a:\u00b2")
  def test_no_address(self, text):
    self.assertFalse(rendezvous.is_address(text))

  def test_where_jax_listens(self):
    with (
      mock.patch.dict("os.environ", JAX_COORDINATOR_BIND_ADDRESS="all"),
      self.assertRaisesRegex(config_lib.ConfigError, "BIND_ADDRESS='all'"),
    ):
      rendezvous.meet("127.0.0.1:1", 2, 0, 1)


if __name__ == "__main__":
  absltest.main()
