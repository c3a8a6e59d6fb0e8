"""Shapes of the batches of texts: few of them, since each is compiled."""


def length(n: int, T: int) -> int:
  """Return a length for n <= T tokens, rounded up so that few are compiled.

  The length is the next of 16, 64, 256, ..., and at most T.

  Args:
    n: number of tokens.
    T: config.model.T.
  """
  padded = 16
  while padded < n:
    padded *= 4
  return min(T, padded)


def describe(count: int, T: int) -> str:
  """Return "3 texts of up to 64 tokens", for messages."""
  return f"{count} text{'s' * (count > 1)} of up to {T} tokens"
