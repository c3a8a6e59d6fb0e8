"""Queries, and what is like them, in one array for each stream.

An array of this kind, in a kernel a reference, is a tuple of arrays. It is
either one array [B, T, Nq, H], where query head n * G + g reads key head n. Or
it has G arrays [B, T, N, H], the g-th with the query heads g of all groups.
Then nothing has to be stacked before a kernel or split behind it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.experimental.pallas as pl

from pallas_kernels.hopper import mosaic

Streams: TypeAlias = tuple[jax.Array, ...]


class Tile(NamedTuple):
  """Rows of one query head, in one of several references.

  Attributes:
    refs: references [rows, H], one for each stream.
    stream: which of them it is.
  """

  refs: list[mosaic.Ref]
  stream: mosaic.Index

  def do(self, action: Callable[[mosaic.Ref], None]) -> None:
    """Call `action` with the reference."""
    if len(self.refs) == 1:
      action(self.refs[0])
    elif isinstance(self.stream, int):
      action(self.refs[self.stream])
    else:
      for i, ref in enumerate(self.refs):
        pl.when(self.stream == i)(functools.partial(action, ref))


def shape(streams: Streams) -> tuple[int, int, int, int]:
  """Return (B, T, Nq, H), with the query heads of all streams."""
  B, T, heads, H = streams[0].shape
  return B, T, heads * len(streams), H


def tile(
  streams: Streams,
  b: mosaic.Index,
  rows: Any,
  n: mosaic.Index,
  g: mosaic.Index,
  G: int,
) -> Tile:
  """Return the rows of query head g in the group of key head n.

  Args:
    streams: references.
    b: sequence.
    rows: rows, as `pl.ds` gives them.
    n: key head.
    g: query head in its group.
    G: query heads of a key head.
  """
  if len(streams) == 1:
    return Tile([streams[0].at[b, rows, n * G + g]], 0)
  return Tile([x.at[b, rows, n] for x in streams], g)


def load(
  source: Tile | mosaic.Ref, target: mosaic.Ref, full: mosaic.Ref
) -> None:
  """Start a copy to shared memory that arrives at the barrier `full`."""

  def copy(ref):
    mosaic.copy_in(ref, target, full)

  source.do(copy) if isinstance(source, Tile) else copy(source)


def store(source: mosaic.Ref, target: Tile) -> None:
  """Start a copy from shared memory."""
  target.do(lambda ref: mosaic.copy_out(source, ref))


def like(
  streams: Streams, B: int | None = None
) -> tuple[jax.ShapeDtypeStruct, ...]:
  """Return the shapes of arrays like the streams, for B sequences."""
  return tuple(
    jax.ShapeDtypeStruct((B or x.shape[0], *x.shape[1:]), x.dtype)
    for x in streams
  )
