"""Linear probes: targets by loops, regression by least squares."""

import jax
import numpy as np
import tiny
from absl.testing import absltest, parameterized

from aoarm_jax import orders
from aoarm_jax.config import mechanisms
from aoarm_jax.study import probes

B, T, V, L = 3, 9, 5, 2


def slots_of(s, seed=0, rows=B):
  tokens = tiny.tokens(rows, T, V, seed)
  order = tiny.orders_of("two_stream", rows, T, seed)
  return tokens, order, orders.to_slots(tokens, order, tiny.layout(s, V, T))


def wanted_by_hand(tokens, order, probe, s, streams_end=T):
  """{(window, slot): token} by what was generated when."""
  found = {}
  for b in range(len(tokens)):
    for slot in range(s, T + s - 1):
      rank = slot - s  # Of the own token.
      if probe.by == "recency":
        ranks = [rank - probe.offset]
      else:
        own = order[b][rank if probe.by == "position" else rank + 1]
        ranks = np.flatnonzero(order[b] == own + probe.offset)
      for r in ranks:
        if 0 <= r <= rank:
          found[b, slot] = tokens[b][order[b][r] - 1]
  return found


class ProbeTest(parameterized.TestCase):
  @parameterized.product(s=(1, 2))
  def test_targets_equal_a_loop(self, s):
    tokens, order, slots = slots_of(s)
    for probe in probes.probes(1, T):
      token, is_seen = map(np.asarray, probes.wanted(slots, probe, s))
      want = wanted_by_hand(tokens, order, probe, s)
      self.assertEqual(set(zip(*map(list, np.nonzero(is_seen)))), set(want))
      for at, value in want.items():
        self.assertEqual(token[at], value, (probe, at))

  @parameterized.parameters(("two_stream", 1), ("decoupled_rope", 2))
  def test_sums_fit_and_hits_equal_least_squares(self, mechanism, s):
    made = tiny.make(mechanism, s, T=T, L=L)
    params = tiny.sharp(made)
    streams = mechanisms.MECHANISMS[mechanism].streams
    read = [probes.Probe("recency", 1), probes.Probe("position", -1)]
    if streams == 1:
      read.append(probes.Probe("target", 2))
    windows = slots_of(s, 0, 8), slots_of(s, 1, 8)

    @tiny.quick_jit
    def of_fit(params, tokens, order):
      network = made.bind(params)
      slots = orders.to_slots(tokens, order, made.layout)
      return (
        probes.states(network, slots),
        probes.sums(network, tokens, order, read),
      )

    @tiny.quick_jit
    def of_test(params, tokens, order, maps):
      return probes.hits(made.bind(params), tokens, order, read, maps)

    (x, total), (y, _) = (of_fit(params, *w[:2]) for w in windows)
    self.assertLen(x, L + (streams == 1))
    np.testing.assert_allclose((np.asarray(x) ** 2).mean(-1), 1, atol=1e-3)
    # Before the first layer there is the embedding alone.
    embedded = np.asarray(params["embedding"])[np.asarray(windows[0][2].tokens)]
    rms = np.sqrt((embedded**2).mean(-1, keepdims=True))
    np.testing.assert_allclose(x[0], embedded / rms, atol=1e-4)
    maps = probes.fit(jax.device_get(total))
    right, seen = of_test(params, *windows[1][:2], maps)
    for p, probe in enumerate(read):
      rows = wanted_by_hand(*windows[0][:2], probe, s)
      tests = wanted_by_hand(*windows[1][:2], probe, s)
      np.testing.assert_array_equal(
        seen[p], [sum(b == w for b, _ in tests) for w in range(8)]
      )
      for m in range(len(x)):
        features = np.array([[*x[m][at], 1] for at in rows], np.float64)
        labels = np.eye(V)[list(rows.values())]
        size = features.shape[1]
        ridge = 1e-3 * (features**2).sum() / size
        # Ridge regression is least squares with rows that ask for zeros.
        linear, *_ = np.linalg.lstsq(
          np.concatenate([features, np.sqrt(ridge) * np.eye(size)]),
          np.concatenate([labels, np.zeros((size, V))]),
          rcond=None,
        )
        np.testing.assert_allclose(maps[p, m], linear, atol=2e-3)
        guess = {
          at: np.argmax(np.array([*y[m][at], 1]) @ linear) for at in tests
        }
        hits = [
          sum(guess[at] == tests[at] for at in tests if at[0] == w)
          for w in range(8)
        ]
        np.testing.assert_allclose(right[p, m], hits, atol=1)

  def test_the_own_token_is_read_and_others_are_not(self):
    """Before the first layer: a control of both signs."""
    made = tiny.make("two_stream", T=T, L=L)
    params = tiny.sharp(made)
    read = [probes.Probe("recency", r) for r in (0, 1)]
    tokens, order, _ = slots_of(1, 0, 64)
    held = slots_of(1, 1, 64)
    network = made.bind(params)
    total = probes.sums(network, tokens, order, read)
    maps = probes.fit(jax.device_get(total))
    right, seen = probes.hits(network, *held[:2], read, maps)
    share = np.asarray(right.sum(axis=2)[:, 0] / seen.sum(axis=1))
    self.assertEqual(share[0], 1)
    self.assertLess(share[1], 1.5 / V)


if __name__ == "__main__":
  absltest.main()
