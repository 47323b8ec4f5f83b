"""The two kinds of error a user meets. Every door prints the message as one line and exits with `exit_code`."""


class MoesaicError(Exception):
    """The work cannot be done: a fact, the numbers and a fix, in one line."""

    exit_code = 1


class UsageError(MoesaicError):
    """The request itself is wrong: an unknown key, an impossible value, a missing file."""

    exit_code = 2
