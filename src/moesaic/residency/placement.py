"""Which experts of a cache stay in memory, decided beforehand by a record of which were used.

L layers, E experts of a layer.
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moesaic.errors import MoesaicError, UsageError
from moesaic.weights_io import read_json

HEAD, KEY = "trace.json", "tokens_per_expert"


def read_uses(path: str | Path, num_layers: int, num_experts: int) -> NDArray[np.float64]:
    """(L, E): the share of a layer's assignments that went to each expert.

    From a trace of `moesaic inspect --trace`, or a JSON file whose `tokens_per_expert` is a list of counts per layer.

    Raises UsageError for a path that is neither, or that is of another model.
    """
    path = Path(path)
    file = path / HEAD if path.is_dir() else path
    if not file.is_file():
        raise UsageError(f"{path} is no trace; record one: moesaic inspect MODEL --data FILE --trace DIR")
    try:
        counts_LE = np.array(read_json(file)[KEY], dtype=np.float64)
    except (KeyError, TypeError, ValueError, MoesaicError):
        raise UsageError(f"{file} has no {KEY}, a list of counts for each layer; record the trace anew") from None
    if counts_LE.shape != (num_layers, num_experts):
        found = " x ".join(map(str, counts_LE.shape))
        raise UsageError(
            f"{file} is of {found} layers and experts, and this model has {num_layers} x {num_experts}; record one "
            "of this model"
        )
    sums_L1 = counts_LE.sum(1, keepdims=True)
    if not (np.isfinite(counts_LE).all() and (counts_LE >= 0).all() and (sums_L1 > 0).all()):
        raise UsageError(f"{file} has counts that are negative, or none in some layer; record the trace anew")
    return counts_LE / sums_L1
