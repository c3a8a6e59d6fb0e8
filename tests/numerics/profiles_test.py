"""Attention profiles: against maps written out, and answers that are known."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from absl.testing import absltest, parameterized

from aoarm_jax import orders
from aoarm_jax.config import mechanisms
from aoarm_jax.study import profiles

pytestmark = pytest.mark.thorough

B, T = 3, 7
REAL = np.array([True, False, True])  # The second one fills the batch.


def slow_sums(w, place, position, s):
  """Sums of one head's map [R, S], by loops over rows and keys."""
  edges = profiles.bin_edges(len(w) + 1)
  mass, even = np.zeros((2, 2, len(edges)))
  spread, even_spread = np.zeros((2, 3))
  for i in range(len(w)):
    others = [j for j in range(i + 1) if s <= j < i]
    near = [abs(place[i] - position[j]) for j in range(i + 1)]
    ago = [i - j for j in range(i + 1)]
    with_own = [*others, *[i] * (i >= s)]
    for d, (far, keys) in enumerate(
      ((near, others), (ago, others), (ago, with_own))
    ):
      logs = []
      for j in keys:
        logs.append(np.log(1 + sum(far[other] < far[j] for other in keys)))
        spread[d] += w[i, j] * logs[-1]
        if d < 2:
          bin_ = next(n for n, edge in enumerate(edges) if far[j] <= edge)
          mass[d, bin_] += w[i, j]
          even[d, bin_] += w[i, keys].sum() / len(keys)
      if keys:
        even_spread[d] += w[i, keys].sum() * np.mean(logs)
  return mass, even, spread, even_spread


def maps(bind, params, tokens, order):
  """Softmax maps of every layer [B, R, S, heads], by numpy."""
  slots = orders.to_slots(tokens, order, bind.layout)
  earlier, last = tiny.quick_jit(
    lambda params: profiles.observe(
      bind.bind(params), slots, lambda q, k, v, visible: (q, k)
    )
  )(params)
  out = []
  for q, k in [*zip(*earlier), last]:
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    k = np.repeat(k, q.shape[2] // k.shape[2], axis=2)
    logits = np.einsum("brnh,bsnh->brsn", q, k) / np.sqrt(q.shape[-1])
    R, S = logits.shape[1:3]
    hidden = np.triu(np.ones((R, S), bool), 1)
    logits[:, hidden] = -np.inf
    p = np.exp(logits - logits.max(2, keepdims=True))
    out.append(p / p.sum(2, keepdims=True))
  return slots, out


class ProfileTest(parameterized.TestCase):
  @parameterized.parameters(
    ("two_stream_untied", "prefix", True),
    ("two_stream", "self", False),
    ("register", "prefix", False),
    ("mdlm", "prefix", False),
  )
  def test_needs_one_causal_row_for_each_slot(self, mechanism, sees, supported):
    made = tiny.make(mechanism, content_sees=sees)
    self.assertEqual(profiles.supports(made.model), supported)
    if not supported:
      with self.assertRaisesRegex(ValueError, f"{mechanism}.*no profile"):
        profiles.profile(made.bind(tiny.sharp(made)), None, None, REAL)

  def test_is_that_of_the_maps_written_out(self):
    self.check_maps("two_stream", 2)

  @parameterized.parameters(
    ("decoupled_rope", 1), ("two_stream", 1, tiny.GROUPED)
  )
  @pytest.mark.slow
  def test_is_that_of_more_maps(self, mechanism, s, options=()):
    self.check_maps(mechanism, s, options)

  def check_maps(self, mechanism, s, options=()):
    bind = tiny.make(mechanism, s, L=3, **dict(options))
    N = bind.model.N
    params = tiny.sharp(bind)
    tokens = tiny.tokens(B, T, 5)
    order = tiny.orders_of(mechanism, B, T)
    sums = tiny.quick_jit(
      lambda params: profiles.profile(bind.bind(params), tokens, order, REAL)
    )(params)
    kind = mechanisms.MECHANISMS[mechanism]
    arrays = profiles.to_arrays(*sums, kind)
    tokens, order = tokens[REAL], order[REAL]
    slots, dense = maps(bind, params, tokens, order)
    names = profiles.streams(kind)
    for g, stream in enumerate(names):
      places = np.asarray(
        slots.position if stream == "content" else slots.target_position
      )
      layers = len(arrays[f"{stream}/own"])
      self.assertEqual(layers, 2 if stream == "content" else 3)
      for layer in range(layers):
        G = dense[layer].shape[3] // N
        for n in range(N):
          w = dense[layer][..., n * G + min(g, G - 1)]
          wanted = [np.zeros(()) for _ in range(4)]
          for b in range(REAL.sum()):
            one = slow_sums(w[b], places[b], np.asarray(slots.position)[b], s)
            wanted = [x + y for x, y in zip(wanted, one)]
          for field, value in zip(profiles.Sums._fields, wanted):
            np.testing.assert_allclose(
              arrays[f"{stream}/{field}"][layer, n],
              value,
              1e-4,
              1e-5,
              err_msg=f"{stream} {field} of layer {layer}, head {n}",
            )
          own = np.trace(w, axis1=1, axis2=2).sum()
          np.testing.assert_allclose(
            arrays[f"{stream}/own"][layer, n], own, 1e-4
          )
          np.testing.assert_allclose(
            arrays[f"{stream}/sentinels"][layer, n], w[..., :s].sum(), 1e-4
          )

  def of_weights(self, choose):
    """Indices [2] where every row attends to the slot that `choose` names."""
    order = tiny.orders_of("two_stream", 1, 12)
    slots = orders.to_slots(tiny.tokens(1, 12, 5), order, tiny.layout(1, 5, 12))
    c, t = np.asarray(slots.position[0]), np.asarray(slots.target_position[0])
    w = np.zeros((1, 1, 12, 12), np.float32)
    for i in range(12):
      keys = range(1, i) if i > 1 else [0]
      for j in choose(i, c, t, list(keys)):
        w[0, 0, i, j] += 1 / len(choose(i, c, t, list(keys)))
    sums = profiles.summarise(
      jnp.asarray(w), slots.target_position, slots.position[0], 1
    )
    arrays = {
      f"only/{k}": np.asarray(v)[None, :, 0] for k, v in sums._asdict().items()
    }
    return profiles.locality(arrays, "only")[0, 0], arrays

  def test_last_slot_is_structural_locality_1(self):
    index, _ = self.of_weights(lambda i, c, t, keys: keys[-1:])
    self.assertAlmostEqual(index[1], 1.0, 5)
    self.assertLess(index[0], 0.7)

  def test_nearest_position_is_semantic_locality_1(self):
    def nearest(i, c, t, keys):
      return [min(keys, key=lambda j: abs(c[j] - t[i]))]

    index, _ = self.of_weights(nearest)
    self.assertAlmostEqual(index[0], 1.0, 5)
    self.assertLess(index[1], 0.7)

  def test_uniform_attention_is_0_and_its_own_expectation(self):
    index, arrays = self.of_weights(lambda i, c, t, keys: range(i + 1))
    np.testing.assert_allclose(index, 0, atol=1e-5)
    np.testing.assert_allclose(
      arrays["only/mass"], arrays["only/even"], atol=1e-5
    )
    own = profiles.shares(arrays, "only")["own"]
    self.assertAlmostEqual(own.item(), np.mean(1 / np.arange(1, 13)), 5)

  def test_what_goes_to_sentinels_makes_no_row_distant(self):
    """A tenth of the mass is spread evenly, the rest is on the sentinel."""
    index, arrays = self.of_weights(
      lambda i, c, t, keys: [0] * 9 * i + list(range(i + 1))
    )
    np.testing.assert_allclose(index[:2], 0, atol=1e-5)
    mass, even = (arrays[f"only/{name}"] for name in ("mass", "even"))
    self.assertGreater((even > 0).sum(), 8)
    np.testing.assert_allclose(mass, even, atol=1e-4)
    self.assertGreater(profiles.shares(arrays, "only")["sentinels"].item(), 0.8)

  def test_own_slot_is_the_most_recent_of_the_third_index(self):
    index, _ = self.of_weights(lambda i, c, t, keys: [i])
    self.assertAlmostEqual(index[2], 1.0, 5)
    self.assertTrue(np.isnan(index[1]))

  def test_a_network_that_attends_to_the_nearest_position(self):
    """Queries and keys are one vector, turned slowly by t and by c."""
    bind = tiny.make("decoupled_rope", T=12, D=4, L=1, N=1)
    params = tiny.sharp(bind)
    attention = params["blocks"]["attention"]
    for name in ("query", "key"):
      attention[name] = jnp.zeros_like(attention[name])
      # The second rotary pair: 0.01 radians a position.
      attention[name] = attention[name].at[..., 1].set(1.0)
    norm = jnp.zeros_like(attention["query_norm"]["scale"])
    attention["query_norm"]["scale"] = norm.at[..., 1].set(3e5)
    attention["key_norm"]["scale"] = norm.at[..., 1].set(3e1)
    params["embedding"] = jnp.ones_like(params["embedding"])
    tokens = tiny.tokens(B, 12, 5)
    order = tiny.orders_of("decoupled_rope", B, 12)
    sums = tiny.quick_jit(
      lambda params: profiles.profile(bind.bind(params), tokens, order, REAL)
    )(params)
    kind = mechanisms.MECHANISMS["decoupled_rope"]
    arrays = profiles.to_arrays(*sums, kind)
    index = profiles.locality(arrays, "only")[0, 0]
    self.assertGreater(index[0], 0.99)
    self.assertLess(index[1], 0.7)


if __name__ == "__main__":
  absltest.main()
