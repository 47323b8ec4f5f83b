"""Which experts work on the same tokens, in one layer and from one layer to the next.

T tokens, E experts.
"""

import numpy as np
import torch

from moesaic.analysis.trace import LayerRows

_TOKENS_AT_ONCE = 2**15


def coactivation(one: LayerRows, other: LayerRows | None = None) -> np.ndarray:
    """(E, E') int64: tokens that expert e of one layer and e' of the other both compute; the same layer by default."""
    other = one if other is None else other
    counts = np.zeros((one.num_experts, other.num_experts))
    for first in range(0, len(one), _TOKENS_AT_ONCE):
        chosen_TE = torch.from_numpy(one.chosen(first, first + _TOKENS_AT_ONCE))
        of_other_TE = chosen_TE if other is one else torch.from_numpy(other.chosen(first, first + _TOKENS_AT_ONCE))
        # By torch: numpy's threads are its own, and wait for each other where other work has the cores.
        counts += (chosen_TE.T @ of_other_TE).numpy()  # whole numbers below 2**24: exact
    return counts.astype(np.int64)


def lift(counts: np.ndarray, load: np.ndarray, other_load: np.ndarray, num_tokens: int) -> np.ndarray:
    """Counts over what they would be if the experts were chosen independently of each other; NaN for unused ones.

    Experts of one layer share K places, so that without any preference it is a little below 1 among them.
    """
    expected = np.outer(load, other_load) / max(1, num_tokens)
    return np.divide(counts, expected, out=np.full(counts.shape, np.nan), where=expected > 0)


def partners(lifts: np.ndarray, counts: np.ndarray, number: int, fewest: int) -> list[list[tuple[int, float]]]:
    """For each row the columns of the greatest lift above 1 among those with so many tokens at least."""
    ranked = np.where((counts >= fewest) & (lifts > 1), lifts, -np.inf)
    order = np.argsort(-ranked, axis=1, kind="stable")[:, :number]
    return [
        [(int(column), float(ranked[row, column])) for column in columns if np.isfinite(ranked[row, column])]
        for row, columns in enumerate(order)
    ]
