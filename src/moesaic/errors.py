"""The two kinds of error a user meets. Every door prints the message as one line and exits with `exit_code`."""

import os
import time


class MoesaicError(Exception):
    """The work cannot be done: a fact, the numbers and a fix, in one line."""

    exit_code = 1


class UsageError(MoesaicError):
    """The request itself is wrong: an unknown key, an impossible value, a missing file."""

    exit_code = 2


def let_first_rank_speak(seconds: float = 5.0) -> None:
    """Before another rank of torchrun says why it ends: what the first one says is mostly the same, and torchrun ends
    all ranks as soon as one has ended."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(seconds)
