"""Tile shapes and depths of the Hopper kernels, by shape."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Hopper:
  """One choice of every parameter; sizes in rows or slots.

  Attributes:
    short: longest T and S for which one warpgroup takes a whole sequence of a
      key head, forward; at most 128.
    fused: longest S for which one kernel makes all gradients; at most 128.
    consumers: warpgroups that compute, 64 rows each, forward.
    keys: slots of a key tile, forward.
    stages: key tiles in shared memory, forward.
    pingpong: whether one of two warpgroups exponentiates while the other
      multiplies, forward.
    fused_stages: row tiles in shared memory there.
    fused_depth: key heads there; with 2, the next is loaded during the work.
    blocks: thread blocks there; one a multiprocessor.
    key_consumers: warpgroups that compute, 64 slots each, in the kernel of dk
      and dv.
    key_stages: row tiles in shared memory there.
    query_consumers: warpgroups that compute, 64 rows each, in that of dq.
    query_keys: slots of a key tile there.
    query_stages: key tiles in shared memory there.
  """

  short: int = 128
  fused: int = 128
  consumers: int = 2
  keys: int = 128
  stages: int = 2
  pingpong: bool = True
  fused_stages: int = 4
  fused_depth: int = 2
  blocks: int = 132
  key_consumers: int = 2
  key_stages: int = 3
  query_consumers: int = 2
  query_keys: int = 64
  query_stages: int = 3


def hopper(T: int, H: int) -> Hopper:
  """The choice for sequences of T rows and heads of H; none is measured yet."""
  if H == 64:
    return Hopper(keys=128 if T <= 2048 else 256, query_keys=128)
  return Hopper(fused_stages=2, fused_depth=1, key_stages=2)
