"""The errors of this package."""


class UnsupportedError(NotImplementedError):
  """The named implementation does not support a call; the message says why."""
