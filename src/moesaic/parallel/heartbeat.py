"""Whether the other ranks of a run are still there, and who is not.

Each rank beats: a thread of it writes to the store of the process group that it is alive and what it does, and reads
the beat of the next rank, so that all are watched by one. A process that was stopped, or a host that is gone, beats no
more. A process that died shows itself first by the exchange that it breaks; the beats then tell who it was. Either way
this process ends with an error, and torchrun, which starts all ranks again, does the rest.
"""

import json
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any, NoReturn

import torch.distributed as dist
from torch._C._distributed_c10d import Store

LONGEST_SILENCE = 60.0
"""Seconds without a beat after which a rank counts as gone, unless exchanges are given up sooner."""
BEATS = 20
"""In the time that a rank may be silent."""
LONGEST_INTERVAL = 1.0
NAMING_BEATS = 3
"""How many beats a rank must miss to be named when an exchange has failed."""


class Heartbeat:
    """Beats for this rank and watches the next one, until `stop`."""

    def __init__(self, store: Store, index: int, count: int, timeout_seconds: float) -> None:
        """`store` must be of this run alone; a rank may be silent for `timeout_seconds` or LONGEST_SILENCE."""
        self.doing = "starting"
        """What this rank says of itself."""
        self.silence = min(timeout_seconds, LONGEST_SILENCE)
        self.interval = min(self.silence / BEATS, LONGEST_INTERVAL)
        self._timeout = timeout_seconds
        self._store = store
        self._index, self._count = index, count
        self._next = (index + 1) % count
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """This rank has done its part: nobody is to miss it."""
        self._ended.set()
        self._thread.join(self.silence)

    def explain_broken_exchange(self) -> NoReturn:
        """After an exchange has failed: name who is missing, on the first rank that noticed, and end this process.

        Without clearing up, which could wait for an exchange that nobody will finish.
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which wants what happens here anyway
        store = clone_of(self._store)
        try:
            if store.add("broken", 1) == 1:
                _say(self._explanation(store))
        except RuntimeError:
            _say("an exchange between ranks has failed, and so has the store that would tell whose; ending")
        os._exit(1)

    def _explanation(self, store: Store) -> str:
        before = [_read_beat(store, rank) for rank in range(self._count)]
        time.sleep(NAMING_BEATS * self.interval)
        after = [_read_beat(store, rank) for rank in range(self._count)]
        silent = [
            rank
            for rank, (old, new) in enumerate(zip(before, after, strict=True))
            if rank != self._index and (new is None or new == old) and not (new and new["ended"])
        ]
        if silent:
            return f"{_names(silent, after)} ended or stopped; ending, so that torchrun starts all ranks again"
        return (
            f"an exchange failed in {self.doing} although all ranks are alive: one of them did not come to it within "
            f"{self._timeout:.0f} s; raise parallel.timeout_seconds if a step may take so long"
        )

    def _run(self) -> None:
        store = clone_of(self._store)
        store.set_timeout(timedelta(seconds=self.silence))
        beat: dict[str, Any] = {
            "number": 0, "host": socket.gethostname(), "pid": os.getpid(), "agent": os.environ.get("GROUP_RANK"),
        }  # fmt: skip
        # Looks are counted, not seconds: a process that was stopped itself must not blame another when it goes on.
        seen, missed, broken = None, 0, 0
        while True:
            ended = self._ended.wait(self.interval)
            beat |= {"number": beat["number"] + 1, "doing": self.doing, "ended": ended}
            try:
                store.set(_key(self._index), json.dumps(beat))
                if ended:
                    return
                broken += store.check(["broken"])
                look = _read_beat(store, self._next)
            except RuntimeError:  # its process has gone, with the run if this one is at its end as well
                if not self._ended.wait(self.silence):
                    _end(f"the store of torchrun has not answered for {self.silence:.0f} s; ending")
                return
            if broken > 2 * NAMING_BEATS:
                _end(None)  # this rank may wait for one that has noticed, and has ended
            if look != seen or (look and look["ended"]):
                seen, missed = look, 0
                continue
            missed += 1
            if missed * self.interval >= self.silence:
                self._give_up_next(beat, look)

    def _give_up_next(self, own: dict[str, Any], beat: dict[str, Any] | None) -> NoReturn:
        line = (
            f"{_names([self._next], {self._next: beat})} has not moved for {self.silence:.0f} s; ending, so that "
            "torchrun starts all ranks again"
        )
        if beat and own["agent"] is not None and own["agent"] == beat["agent"]:
            # torchrun on this host would wait half a minute for a stopped process to end by itself.
            with suppress(ProcessLookupError, PermissionError):
                os.kill(beat["pid"], signal.SIGKILL)
        _end(line)


def clone_of(store: Any) -> Store:
    """The same store, for another thread. torch's stubs do not know of it."""
    return store.clone()


def is_broken_exchange(error: BaseException) -> bool:
    """Whether `error` says that ranks could not exchange something, be it that one has gone or that time ran out."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _key(rank: int) -> str:
    return f"beat/{rank}"


def _read_beat(store: Store, rank: int) -> dict[str, Any] | None:
    """The last beat; None before the first one."""
    return json.loads(store.get(_key(rank))) if store.check([_key(rank)]) else None


def _names(ranks: list[int], beats: Any) -> str:
    """Such as: rank 3 on host-b (step 41)."""
    named = []
    for rank in ranks:
        beat = beats[rank]
        named.append(f"rank {rank} on {beat['host']} ({beat['doing']})" if beat else f"rank {rank}")
    return ", ".join(named)


def _end(line: str | None) -> NoReturn:
    if line:
        _say(line)
    os._exit(1)


def _say(line: str) -> None:
    sys.stderr.write(f"error: {line}\n")
    sys.stderr.flush()
