"""Attention: every implementation against float64 numpy."""

import doctest
import functools
from unittest import mock

import attention_cases
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import pallas_kernels
from pallas_kernels import api, tuning

_B, _N, _GROUP, _H = 3, 2, 2, 6
_SHAPES = ((7, 7), (5, 7), (7, 5), (1, 7), (7, 1))
_ON_CPU = ("reference", "xla")


def _inputs(T, S, seed=0, dtype=np.float32, N=_N, group=_GROUP, H=_H):
  generator = np.random.default_rng(seed)
  return tuple(
    generator.normal(size=shape).astype(dtype)
    for shape in ((_B, T, N * group, H), (_B, S, N, H), (_B, S, N, H))
  )


def _ragged(T, S):
  """Visible counts of all kinds: 0, 1, some, S and more than S."""
  visible = np.random.default_rng(0).integers(0, S + 1, (_B, T), np.int32)
  visible[0, 0], visible[1, 0], visible[2, 0] = 0, S, S + 2
  return visible


@functools.cache
def _attend(name, scale=None, return_lse=False):
  return jax.jit(
    functools.partial(
      pallas_kernels.any_order_attention,
      implementation=name,
      scale=scale,
      return_lse=return_lse,
    )
  )


@functools.cache
def _pull(name):
  """Jitted gradients of sum(out * weight) for q, k and v."""

  def loss(qkv, visible, weight):
    return (_attend(name)(*qkv, visible) * weight).sum()

  return jax.jit(jax.grad(loss))


def _slow(q, k, v, visible=None, scale=None, key_rank=None):
  """(out, lse) row by row in float64."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  B, T, Nq, H = q.shape
  S, N = k.shape[1:3]
  if visible is None:
    visible = np.tile(np.minimum(np.arange(1, T + 1), S), (B, 1))
  if visible.ndim == 2:
    visible = np.repeat(visible[..., None], Nq // N, axis=2)
  if key_rank is None:
    key_rank = np.tile(np.arange(S), (B, 1))
  out, lse = np.zeros((B, T, Nq, H)), np.full((B, T, Nq), -np.inf)
  for b, i, n in np.ndindex(B, T, Nq):
    head, stream = divmod(n, Nq // N)
    seen = key_rank[b] < visible[b, i, stream]
    if not seen.any():
      continue
    score = k[b, seen, head] @ q[b, i, n] * (scale or H**-0.5)
    weight = np.exp(score - score.max())
    out[b, i, n] = weight / weight.sum() @ v[b, seen, head]
    lse[b, i, n] = score.max() + np.log(weight.sum())
  return out, lse


@pytest.mark.thorough
class AttentionTest(parameterized.TestCase):
  @parameterized.product(shape=_SHAPES, name=_ON_CPU)
  def test_causal_is_aligned_to_the_first_slot(self, shape, name):
    q, k, v = _inputs(*shape)
    out = _attend(name)(q, k, v)
    np.testing.assert_allclose(out, _slow(q, k, v)[0], atol=1e-5)
    # The last slot aligned to the last row is another function: seen here.
    if shape == (5, 7):
      visible = np.tile(np.arange(3, 8), (_B, 1))
      self.assertGreater(np.abs(out - _slow(q, k, v, visible)[0]).max(), 0.1)

  @parameterized.product(shape=_SHAPES, name=_ON_CPU)
  def test_visible_prefixes(self, shape, name):
    q, k, v = _inputs(*shape)
    visible = _ragged(*shape)
    out = _attend(name, 0.3)(q, k, v, visible)
    np.testing.assert_allclose(out, _slow(q, k, v, visible, 0.3)[0], atol=1e-5)

  @parameterized.product(name=_ON_CPU, visible=(0, 1, 4, 7), lse=(False, True))
  def test_the_same_prefix_for_all(self, name, visible, lse):
    q, k, v = _inputs(5, 7)
    attend = functools.partial(
      pallas_kernels.any_order_attention,
      visible=visible,
      return_lse=lse,
      implementation=name,
    )
    want = _slow(q, k, v, np.full((_B, 5), visible))
    got = jax.jit(attend)(q, k, v)
    chex.assert_trees_all_close(got, want if lse else want[0], atol=1e-5)

  @parameterized.parameters(np.int32, np.array, jnp.int32)
  def test_the_same_prefix_as_a_scalar(self, make):
    """Of any array library, as it is and traced."""
    q, k, v = _inputs(5, 7)
    want = _slow(q, k, v, np.full((_B, 5), 4))[0]
    attend = functools.partial(
      pallas_kernels.any_order_attention, implementation="xla"
    )
    for attend_in_its_way in (attend, jax.jit(attend)):
      out = attend_in_its_way(q, k, v, make(4))
      np.testing.assert_allclose(out, want, atol=1e-5)
    with self.assertRaisesRegex(ValueError, "visible must be an array of in"):
      attend(q, k, v, np.float32(4))

  @parameterized.product(shape=_SHAPES, name=_ON_CPU, lse=(False, True))
  def test_streams_that_see_differently(self, shape, name, lse):
    """Heads of one group with prefixes of their own; also with an lse."""
    q, k, v = _inputs(*shape)
    visible = np.stack([_ragged(*shape), _ragged(*shape)[::-1]], axis=-1)
    got = _attend(name, return_lse=lse)(q, k, v, visible)
    want = _slow(q, k, v, visible)
    chex.assert_trees_all_close(got, want if lse else want[0], atol=1e-5)

  @parameterized.product(shape=_SHAPES, name=_ON_CPU, per_stream=(False, True))
  def test_ranks(self, shape, name, per_stream):
    """Slots in natural order, seen by rank: ties and gaps too."""
    q, k, v = _inputs(*shape)
    visible = _ragged(*shape)
    if per_stream:
      visible = np.stack([visible, visible[::-1]], axis=-1)
    rank = np.random.default_rng(3).integers(0, 9, k.shape[:2], np.int32)
    got = _attend(name, return_lse=True)(q, k, v, visible, key_rank=rank)
    want = _slow(q, k, v, visible, key_rank=rank)
    chex.assert_trees_all_close(got, want, atol=1e-5)
    out = _attend(name)(q, k, v, visible, key_rank=rank)
    np.testing.assert_allclose(out, want[0], atol=1e-5)

  @parameterized.parameters(*_ON_CPU)
  def test_parts_make_the_whole(self, name):
    """Merged by log-sum-exp: values and gradients of one attention."""
    qkv = _inputs(5, 7)
    visible = _ragged(5, 7)
    weight = np.random.default_rng(9).normal(size=qkv[0].shape)
    attend = _attend(name, return_lse=True)

    def merged(q, k, v):
      parts = [
        attend(q, k[:, :3], v[:, :3], visible),
        attend(q, k[:, 3:], v[:, 3:], visible - 3),
      ]
      outs, lses = (jnp.stack(x) for x in zip(*parts))
      # Empty rows weigh nothing, and a difference of infinities has no slope.
      lses = jnp.where(jnp.isfinite(lses), lses, -1e30)
      share = jax.nn.softmax(lses, axis=0)
      return (outs * share[..., None]).sum(0)

    def loss(qkv):
      return (merged(*qkv) * weight).sum()

    np.testing.assert_allclose(merged(*qkv), _slow(*qkv, visible)[0], atol=1e-5)
    want = _pull("reference")(qkv, visible, weight)
    chex.assert_trees_all_close(jax.grad(loss)(qkv), want, atol=1e-5)

  @parameterized.parameters(*_ON_CPU)
  def test_keys_gathered_from_devices(self, name):
    """The same attention and gradients, up to where the slots lie."""
    qkv, visible = _inputs(5, 12), _ragged(5, 12)
    weight = np.random.default_rng(9).normal(size=qkv[0].shape)
    gathered = functools.partial(attention_cases.gathered, P=3)
    q, k, v = qkv
    dealt = q, gathered(k), gathered(v)
    np.testing.assert_allclose(
      _attend(name)(*dealt, visible), _attend(name)(*qkv, visible), atol=1e-6
    )
    dq, dk, dv = _pull(name)(qkv, visible, weight)
    want = dq, gathered(dk), gathered(dv)
    chex.assert_trees_all_close(_pull(name)(dealt, visible, weight), want)

  @parameterized.parameters(*_ON_CPU)
  def test_an_empty_row_is_zero_and_has_no_gradient(self, name):
    """Exactly 0, and a cotangent there reaches nothing and stays finite."""
    qkv = _inputs(5, 7)
    visible = np.array([[0, 2, 0, 7, 1], [0] * 5, [1, 2, 3, 4, 5]])
    out = np.asarray(_attend(name)(*qkv, visible))
    empty = (visible == 0)[..., None, None]
    self.assertTrue(((out == 0) == empty).all())
    ones = np.ones_like(out)
    for gradient in _pull(name)(qkv, visible, ones * np.where(empty, 3, 0)):
      np.testing.assert_array_equal(gradient, 0.0)
    everywhere = _pull(name)(qkv, visible, ones)
    elsewhere = _pull(name)(qkv, visible, ones * np.where(empty, 0, 1))
    for gradient, same in zip(everywhere, elsewhere):
      self.assertTrue(np.isfinite(gradient).all())
      self.assertGreater(np.abs(gradient).max(), 0.1)
      np.testing.assert_array_equal(gradient, same)

  @parameterized.parameters(*_ON_CPU)
  def test_what_is_not_visible_does_not_count(self, name):
    """Bitwise: hidden slots may hold anything finite, however large."""
    q, k, v = _inputs(5, 7)
    visible = _ragged(5, 7).clip(0, 4)
    out = _attend(name)(q, k, v, visible)
    hidden = (np.arange(7) >= 4)[:, None, None]
    k, v = (
      np.where(hidden, np.float32(1e4), k),
      np.where(hidden, np.float32(-1e4), v),
    )
    np.testing.assert_array_equal(out, _attend(name)(q, k, v, visible))

  @parameterized.parameters(*_ON_CPU)
  def test_query_heads_of_a_group_are_neighbours(self, name):
    """Query head n * group + g reads key head n, and no other."""
    q, k, v = _inputs(7, 7, N=3, group=2)
    out = _attend(name)(q, k, v)
    # A new array: JAX may still be reading the old one.
    v = v + np.eye(3, dtype=np.float32)[1, :, None]
    moved = np.abs(out - _attend(name)(q, k, v)).max(axis=(0, 1, 3)) > 0.5
    self.assertEqual(moved.tolist(), [False, False, True, True, False, False])

  @parameterized.product(shape=((5, 7), (7, 5)), causal=(True, False))
  def test_gradients_agree(self, shape, causal):
    qkv = _inputs(*shape)
    visible = None if causal else _ragged(*shape)
    weight = np.random.default_rng(9).normal(size=qkv[0].shape)
    want = _pull("reference")(qkv, visible, weight)
    for a, b in zip(want, _pull("xla")(qkv, visible, weight)):
      self.assertGreater(np.abs(a).max(), 0.1)
      np.testing.assert_allclose(a, b, atol=1e-5)

  def test_gradients_are_those_of_the_definition(self):
    """Central differences in float64 numpy."""
    arrays = _inputs(3, 3, N=1, group=1, H=2)
    visible = np.array([[1, 0, 3], [2, 2, 2], [3, 1, 0]])
    weight = np.random.default_rng(9).normal(size=arrays[0].shape)
    gradients = _pull("reference")(arrays, visible, weight)
    for which, gradient in enumerate(gradients):
      for index in np.ndindex(gradient.shape):
        ends = []
        for step in (1e-5, -1e-5):
          moved = [np.array(x, np.float64) for x in arrays]
          moved[which][index] += step
          ends.append((_slow(*moved, visible)[0] * weight).sum())
        slope = (ends[0] - ends[1]) / 2e-5
        self.assertAlmostEqual(float(gradient[index]), slope, delta=1e-4)

  @parameterized.product(name=_ON_CPU, causal=(True, False))
  def test_jit_and_vmap(self, name, causal):
    """A vmapped call over a leading axis equals the calls one by one."""
    first, second = _inputs(5, 7), _inputs(5, 7, seed=1)
    visible = None if causal else np.stack([_ragged(5, 7)] * 2)
    stacked = [np.stack(pair) for pair in zip(first, second)]
    axes = (0, 0, 0, None if causal else 0)
    out = jax.jit(jax.vmap(_attend(name), axes))(*stacked, visible)
    for i, qkv in enumerate((first, second)):
      each = _attend(name)(*qkv, None if causal else visible[i])
      np.testing.assert_allclose(out[i], each, atol=1e-6)

  @parameterized.product(name=_ON_CPU, causal=(True, False))
  def test_bfloat16(self, name, causal):
    """Within its rounding, and the output keeps the dtype."""
    q, k, v = _inputs(7, 7, dtype=jnp.bfloat16)
    visible = None if causal else _ragged(7, 7)
    out = _attend(name)(q, k, v, visible)
    self.assertEqual(out.dtype, jnp.bfloat16)
    np.testing.assert_allclose(
      np.asarray(out, np.float64), _slow(q, k, v, visible)[0], atol=0.03
    )

  def test_float64_in_the_reference(self):
    with jax.enable_x64(True):
      q, k, v = _inputs(5, 7, dtype=np.float64)
      out = _attend("reference")(q, k, v)
      self.assertEqual(out.dtype, jnp.float64)
      np.testing.assert_allclose(out, _slow(q, k, v)[0], atol=1e-12)


class StreamsTest(parameterized.TestCase):
  def arrays(self):
    """(two streams, k, v, visible); the second stream sees one slot less."""
    B, T, N, H = 2, 5, 3, 4
    generator = np.random.default_rng(0)
    draw = generator.normal(size=(4, B, T, N, H)).astype(np.float32)
    content, query, k, v = map(jnp.asarray, draw)
    before = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    return [content, query], k, v, np.stack([before + 1, before], -1)

  def test_the_example_in_the_docstring(self):
    failed, tried = doctest.testmod(api)
    self.assertEqual((failed, tried > 5), (0, True))

  @parameterized.parameters(list, tuple)
  def test_a_list_of_streams(self, kind):
    """Each as it would be alone; side by side along the heads is wrong."""
    streams, k, v, visible = self.arrays()
    attend = functools.partial(api.any_order_attention, return_lse=True)
    outs, lses = jax.jit(attend)(kind(streams), k, v, visible)
    for g, (out, lse) in enumerate(zip(outs, lses)):
      want, want_lse = attend(streams[g], k, v, visible[..., g])
      np.testing.assert_allclose(out, want, atol=1e-6)
      np.testing.assert_allclose(lse, want_lse, atol=1e-6)
    (alone,) = api.any_order_attention(streams[:1], k, v)
    np.testing.assert_allclose(alone, outs[0], atol=1e-6)
    wrong = api.any_order_attention(jnp.concatenate(streams, 2), k, v, visible)
    self.assertGreater(np.abs(wrong[:, :, :3] - outs[0]).max(), 0.1)

  @parameterized.product(
    name=("reference", "xla", "blockwise"), lse=(False, True)
  )
  def test_streams_with_several_heads_for_a_key_head(self, name, lse):
    """Head m of a stream reads key head m // 2, as without streams."""
    streams, k, v, visible = self.arrays()
    streams = [jnp.concatenate([x, -x[:, :, ::-1]], axis=2) for x in streams]
    attend = functools.partial(
      api.any_order_attention, return_lse=lse, implementation=name
    )
    got = attend(streams, k, v, visible)
    outs, lses = got if lse else (got, (None, None))
    k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
    for g, (out, of_rows) in enumerate(zip(outs, lses)):
      want, want_lse = api.any_order_attention(
        streams[g], k, v, visible[..., g], return_lse=True
      )
      np.testing.assert_allclose(out, want, atol=1e-6)
      if lse:
        np.testing.assert_allclose(of_rows, want_lse, atol=1e-6)
    # One prefix for all streams.
    shared = api.any_order_attention(streams, k[:, :, ::2], v[:, :, ::2])
    np.testing.assert_allclose(shared[0], outs[0], atol=1e-6)

  @parameterized.parameters(
    (lambda x: [], "with a multiple M of the N=3 heads of k; got no streams"),
    (
      lambda x: [x[0], x[1][:, 1:]],
      r"got float32 \(2, 5, 3, 4\), float32 \(2, ",
    ),
    (lambda x: [x[0], x[1].astype(jnp.bfloat16)], "of one dtype, with"),
    (lambda x: [x[0][:, :, :2]], "M of the N=3 heads of k; got float32"),
    (lambda x: [x[0][0], x[1][0]], r"each stream must be \[B, T, M, H\]"),
  )
  def test_streams_that_do_not_fit(self, change, message):
    streams, k, v, visible = self.arrays()
    with self.assertRaisesRegex(ValueError, message):
      api.any_order_attention(change(streams), k, v, visible)


class ChooserTest(parameterized.TestCase):
  def test_none_is_xla_on_a_cpu(self):
    """The same program, not only the same numbers."""
    q, k, v = _inputs(7, 7)

    def program(name):
      return str(
        jax.make_jaxpr(
          functools.partial(
            pallas_kernels.any_order_attention, implementation=name
          )
        )(q, k, v)
      )

    self.assertEqual(program(None), program("xla"))
    self.assertNotEqual(program(None), program("reference"))

  def test_every_name_is_known(self):
    self.assertEqual(
      pallas_kernels.IMPLEMENTATIONS[:3], (*_ON_CPU, "blockwise")
    )
    self.assertTrue(
      issubclass(pallas_kernels.UnsupportedError, NotImplementedError)
    )

  @parameterized.named_parameters(
    ("visible", dict(), True, r"`visible` \(None, a positive int, or"),
    ("lse", dict(), None, "`return_lse`"),
    ("rows", dict(T=5), False, r"T=5 rows over S=7 slots \(T = S only\)"),
    ("dtype", dict(), False, r"float32 \(bfloat16 and float16 only\)"),
    ("head", dict(dtype=jnp.bfloat16), False, r"H=6 \(multiples of 8 up to"),
    ("wide", dict(dtype=jnp.bfloat16, H=136), False, r"H=136 \(multiples"),
    (
      "platform",
      dict(dtype=jnp.bfloat16, H=8),
      False,
      r"device 'cpu' \(NVIDIA",
    ),
  )
  def test_cudnn_says_what_it_lacks(self, options, visible, message):
    q, k, v = _inputs(**dict(T=7, S=7) | options)
    lse = visible is None
    visible = np.ones(q.shape[:2], np.int32) if visible else None
    message = "attention 'cudnn' does not support " + message
    with self.assertRaisesRegex(pallas_kernels.UnsupportedError, message):
      pallas_kernels.any_order_attention(
        q, k, v, visible, return_lse=lse, implementation="cudnn"
      )

  def test_one_row_over_a_long_cache(self):
    """On a GPU cuDNN is faster there, and has lengths but no ranks."""
    self.assertEqual(tuning.fastest("gpu", 1, 4096)[0], "cudnn")
    for T, S in ((1, 1024), (2, 4096), (128, 128)):
      self.assertEqual(tuning.fastest("gpu", T, S)[0], "mosaic_gpu")
    q, k, v = _inputs(1, 7)
    visible, rank = np.ones((_B, 1), np.int32), np.ones((_B, 7), np.int32)
    message = "'cudnn' does not support `key_rank`"
    with self.assertRaisesRegex(pallas_kernels.UnsupportedError, message):
      pallas_kernels.any_order_attention(
        q, k, v, visible, key_rank=rank, implementation="cudnn"
      )

  def test_an_unknown_name_lists_the_known(self):
    message = "unknown attention implementation 'flash'; there are: reference"
    with self.assertRaisesRegex(ValueError, message):
      pallas_kernels.any_order_attention(*_inputs(7, 7), implementation="flash")

  @parameterized.named_parameters(
    ("q_rank", lambda q, k, v: (q[0], k, v), "wants q .* got "),
    ("k_rank", lambda q, k, v: (q, k[0], v[0]), "wants q"),
    ("k_unlike_v", lambda q, k, v: (q, k, v[:, 1:]), "wants q"),
    ("odd_shards", lambda q, k, v: (q, k[None], v[None]), "P even; got"),
    ("shards_unlike", lambda q, k, v: (q, k[None, :, 1:], v), "wants q"),
    ("batch", lambda q, k, v: (q[1:], k, v), "does not fit k .* B and H"),
    ("head_dim", lambda q, k, v: (q[..., 1:], k, v), "B and H must be equal"),
    ("group", lambda q, k, v: (q[:, :, 1:], k, v), "Nq a multiple of N"),
    (
      "dtype",
      lambda q, k, v: (q, k, v.astype(jnp.bfloat16)),
      "float32, float32, bfloat16; give them one",
    ),
    ("integers", lambda *x: [y.astype(np.int32) for y in x], "floating-po"),
    ("no_slots", lambda q, k, v: (q, k[:, :0], v[:, :0]), "of nothing: q .* k"),
    ("no_heads", lambda q, k, v: (q, k[:, :, :0], v[:, :, :0]), "of nothing"),
  )
  def test_arguments_that_do_not_fit(self, change, message):
    with self.assertRaisesRegex(ValueError, message):
      pallas_kernels.any_order_attention(*change(*_inputs(5, 7)))

  @parameterized.parameters(((_B, 7),), ((5,),), ((_B, 5, 1),), ((1, 5),))
  def test_visible_must_be_one_count_a_row(self, shape):
    message = r"visible .* must be \[B, T\] = \(3, 5\) or .* \(3, 5, 2\)"
    with self.assertRaisesRegex(ValueError, message):
      pallas_kernels.any_order_attention(
        *_inputs(5, 7), np.ones(shape, np.int32)
      )

  def test_counts_and_ranks_are_integers(self):
    """A half would be rounded in one implementation, cut off in another."""
    q, k, v = _inputs(5, 7)
    visible, rank = np.ones((_B, 5), np.int32), np.ones((_B, 7), np.int32)
    for wrong in (visible + 0.5, visible.tolist(), visible > 0):
      with self.assertRaisesRegex(ValueError, "visible must be an array of in"):
        pallas_kernels.any_order_attention(q, k, v, wrong)
    with self.assertRaisesRegex(ValueError, "key_rank must be an array of in"):
      pallas_kernels.any_order_attention(q, k, v, visible, key_rank=rank + 0.5)

  def test_ranks_need_visible_and_one_rank_a_slot(self):
    q, k, v = _inputs(5, 7)
    visible, rank = np.ones((_B, 5), np.int32), np.ones((_B, 7), np.int32)
    message = "key_rank needs an array of visible"
    with self.assertRaisesRegex(ValueError, message):
      pallas_kernels.any_order_attention(q, k, v, key_rank=rank)
    with self.assertRaisesRegex(ValueError, r"must be \[B, S\] = \(3, 7\)"):
      pallas_kernels.any_order_attention(q, k, v, visible, key_rank=visible)


class OneRowTest(parameterized.TestCase):
  @parameterized.product(S=(1, 97, 1024, 5000), group=(1, 2), H=(64, 128))
  @pytest.mark.gpu
  def test_cudnn(self, S, group, H):
    """Lengths a sequence, none of them too; forward and backward."""
    attend = functools.partial(
      pallas_kernels.any_order_attention, implementation="cudnn"
    )
    self._check(attend, S, group, H)

  def test_lengths_and_gradients_around_cudnn(self):
    """What is ours of it, with JAX's own attention where cuDNN is called."""
    attention = jax.nn.dot_product_attention

    def on_cpu(*args, implementation, **options):
      self.assertIn(implementation, ("cudnn", "xla"))
      return attention(*args, **options, implementation="xla")

    with mock.patch.object(jax.nn, "dot_product_attention", on_cpu):
      attend = functools.partial(api._cudnn, scale=64**-0.5)
      self._check(attend, 97, 2, 64)

      def one_by_one(q, k, v, visible):
        q, k, v, visible = (x[:, None] for x in (q, k, v, visible))
        return jax.vmap(jax.checkpoint(attend))(q, k, v, visible)[:, 0]

      self._check(one_by_one, 97, 2, 64)

  def _check(self, attend, S, group, H):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (4, 1, 3 * group, H), (4, S, 3, H), (4, S, 3, H)
    q, k, v = (
      jax.random.normal(key, shape, jnp.bfloat16)
      for key, shape in zip(keys, shapes)
    )
    visible = jnp.array([[0], [1], [S // 2], [S]], jnp.int32)
    weight = jax.random.normal(keys[3], q.shape, jnp.float32)

    def loss(attend, q, k, v):
      out = attend(q, k, v, visible)
      return jnp.sum(out.astype(jnp.float32) * weight), out

    def run(attend, *arrays):
      function = jax.value_and_grad(
        functools.partial(loss, attend), (0, 1, 2), has_aux=True
      )
      (_, out), gradients = jax.jit(function)(*arrays)
      return out, *gradients

    wanted = run(
      functools.partial(
        pallas_kernels.any_order_attention, implementation="reference"
      ),
      *(x.astype(jnp.float32) for x in (q, k, v)),
    )
    for got, want in zip(run(attend, q, k, v), wanted):
      error = jnp.linalg.norm((got.astype(jnp.float32) - want).ravel())
      scale = jnp.linalg.norm(want.ravel())
      self.assertLessEqual(float(error), 8e-3 * float(scale))


if __name__ == "__main__":
  absltest.main()
