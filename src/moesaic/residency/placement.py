"""Which experts of a cache stay in memory, decided beforehand by a record of which were used.

L layers, E experts of a layer.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moesaic.errors import MoesaicError, UsageError
from moesaic.weights_io import read_json

HEAD, USES, HITS = "trace.json", "tokens_per_expert", "cache_hits"


@dataclass(frozen=True)
class Record:
    """How a model's experts were used on some text."""

    counts: NDArray[np.float64]
    """(L, E): tokens that went to each expert."""
    hits: NDArray[np.float64] | None
    """(L, E + 1): of these, those that an LRU cache of 0 ... E experts of the layer would have had; None where the file
    does not say."""

    @property
    def uses(self) -> NDArray[np.float64]:
        """(L, E): the share of a layer's assignments that went to each expert."""
        return self.counts / self.counts.sum(1, keepdims=True)

    def placed_hits(self, slots: int) -> float:
        """The share of all assignments whose expert is one of the most used, as many as there are slots."""
        best = np.argsort(-self.uses, axis=None, kind="stable")[:slots]
        return float(self.counts.flat[best].sum() / self.counts.sum())

    def lru_hits(self, slots: int) -> float | None:
        """The same of caches of the layers that keep what was used last, and share the slots evenly."""
        if self.hits is None:
            return None
        num_layers, most = self.hits.shape[0], self.hits.shape[1] - 1
        sizes_L = np.minimum(slots // num_layers + (np.arange(num_layers) < slots % num_layers), most)
        return float(self.hits[np.arange(num_layers), sizes_L].sum() / self.counts.sum())

    def forecast(self, slots: int) -> str:
        """What both would hit, in words."""
        lru = self.lru_hits(slots)
        other = "" if lru is None else f", where the {slots} used last would hit {lru:.0%}"
        return f"the {slots} experts used most take {self.placed_hits(slots):.0%} of the trace{other}"


def read_uses(path: str | Path, num_layers: int, num_experts: int) -> NDArray[np.float64]:
    """(L, E): `Record.uses` of a file that `read_record` reads."""
    return read_record(path, num_layers, num_experts).uses


def read_record(path: str | Path, num_layers: int, num_experts: int) -> Record:
    """From a trace of `--trace`, or a JSON file whose `tokens_per_expert` is a list of counts for each layer.

    Raises UsageError for a path that is neither, or that is of another model.
    """
    path = Path(path)
    file = path / HEAD if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"{path} is no trace; record one: moesaic inspect MODEL --data FILE --trace DIR")
    try:
        values = read_json(file)
        counts_LE = np.array(values[USES], dtype=np.float64)
        hits = np.array(values[HITS], dtype=np.float64) if HITS in values else None
    except (KeyError, TypeError, ValueError, MoesaicError):
        raise UsageError(f"{file} has no {USES}, a list of counts for each layer; record the trace anew") from None
    if counts_LE.shape != (num_layers, num_experts):
        found = " x ".join(map(str, counts_LE.shape))
        raise UsageError(
            f"{file} is of {found} layers and experts, and this model has {num_layers} x {num_experts}; record one "
            "of this model"
        )
    if not (np.isfinite(counts_LE).all() and (counts_LE >= 0).all() and (counts_LE.sum(1) > 0).all()):
        raise UsageError(f"{file} has counts that are negative, or none in some layer; record the trace anew")
    fits = hits is None or (hits.shape == (num_layers, num_experts + 1) and bool(np.isfinite(hits).all()))
    if not fits:
        raise UsageError(f"{file} has {HITS} that are not {num_experts + 1} numbers a layer; record the trace anew")
    return Record(counts_LE, hits)
