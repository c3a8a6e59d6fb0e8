"""The common class of all errors that a user can mend."""


class UserError(Exception):
  """One clear line: what is wrong, where, and how to mend it.

  Attributes:
    exit_code: of a program that ends by it. 1: the run failed. 2: the command
      cannot be carried out as it was written.
  """

  exit_code = 1
