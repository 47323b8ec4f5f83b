"""Commands that run a model over the ranks of torchrun: the first one goes on, the others lend it their experts."""

import atexit
import os
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moesaic.model.transformer import Transformer
    from moesaic.parallel.inference import Company, ExpertShare, Leader
    from moesaic.tokenizer import Tokenizer

    Load = Callable[[ExpertShare], tuple[Transformer, Tokenizer]]


def num_ranks() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def load_over_ranks(load: "Load", device: str) -> "tuple[Transformer, Tokenizer]":
    """What `load` returns on the first rank, with the experts of all ranks; the others never return.

    Raises there what `load` raises on any rank.
    """
    from moesaic.errors import let_first_rank_speak
    from moesaic.ops.device import resolve_device
    from moesaic.parallel.inference import join, lead

    if not is_first_rank():
        warnings.simplefilter("ignore")  # the first rank has the same
    company = join(resolve_device(device).type)
    error: BaseException | None = None
    loaded = None
    try:
        loaded = load(company.share)
    except BaseException as raised:
        error = raised
    status = company.agree(error)
    if company.share.is_first and error is not None:
        raise error
    if loaded is None or status:
        let_first_rank_speak()
        os._exit(status)
    if not company.share.is_first:
        _follow(loaded[0], company)
    atexit.register(_dismiss, lead(loaded[0], company))
    return loaded


def _follow(model: "Transformer", company: "Company") -> None:
    """Never returns. Signals are for the first rank: torchrun sends them to all, and what was begun needs all."""
    from moesaic.parallel.inference import LostRankError, follow

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    try:
        follow(model, company)
    except LostRankError:
        _exit(1)  # the first rank says why, if it can
    _exit(0)


def _exit(status: int) -> None:
    """Without clearing up, which could wait for an exchange that nobody will finish."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _dismiss(leader: "Leader") -> None:
    from moesaic.errors import MoesaicError

    with suppress(MoesaicError):  # they have gone
        leader.end()
