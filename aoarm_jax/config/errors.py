"""The base class of all errors that a user can mend."""

from aoarm_jax.config import exit_codes


class UserError(Exception):
  """An error that a user can mend.

  The message is one line. It says what is wrong, where, and how to mend it.

  Attributes:
    exit_code: the exit code of a program that this error ends. 1: the run
      failed. 2: the command cannot be carried out as it was written.
  """

  exit_code = exit_codes.FAILED
