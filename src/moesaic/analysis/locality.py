"""What a cache of n experts would hit: exact LRU stack distances (Mattson et al., IBM Systems Journal 9, 1970).

T tokens, E experts, K experts per token.
"""

import numpy as np

_CELLS_AT_ONCE = 2**18
"""T x E that are compared at once, which a core's cache holds."""


def hit_curve(expert_ids: np.ndarray, num_experts: int) -> np.ndarray:
    """(T, K) ids of one layer, -1 for none -> (E + 1,) int64: rows that an LRU cache of 0 ... E experts would hit.

    A token visits its experts at once: a row hits when its expert is among the n that were used last before the token.
    Of the experts of one token the one in the last column counts as used last. A first use never hits. One pass gives
    the whole curve, since what a larger LRU cache holds includes what a smaller one does.
    """
    depths = stack_depths(expert_ids, num_experts)
    hits_at = np.bincount(depths[depths < num_experts], minlength=num_experts)
    return np.concatenate([[0], np.cumsum(hits_at)])


def stack_depths(expert_ids: np.ndarray, num_experts: int) -> np.ndarray:
    """(N,): how many experts were used more recently than the row's, before its token; E for a first use.

    Rows are in token order, without those that are -1.
    """
    num_tokens, width = expert_ids.shape
    step = max(1, _CELLS_AT_ONCE // num_experts)
    time = np.int32 if expert_ids.size < 2**31 - 1 else np.int64
    count = np.uint8 if num_experts < 2**8 else np.uint16
    last_E = np.zeros(num_experts, time)
    """When each expert was last used, 0 for never."""
    found = []
    for first in range(0, num_tokens, step):
        ids_KT = np.ascontiguousarray(expert_ids[first : first + step].T.astype(np.int64))
        tokens = ids_KT.shape[1]
        # Column t + 1 holds the uses until token t, so that column t is what was known before it. The last row takes
        # what is absent. Tokens lie side by side, which lets a processor compare many at a time.
        used_ET = np.zeros((num_experts + 1, tokens + 1), time)
        used_ET[:-1, 0] = last_E
        times_KT = first * width + 1 + np.arange(tokens) * width + np.arange(width)[:, None]
        used_ET[np.where(ids_KT < 0, num_experts, ids_KT), np.arange(1, tokens + 1)] = times_KT
        np.maximum.accumulate(used_ET, axis=1, out=used_ET)
        before_ET = used_ET[:-1, :-1]
        last_E = used_ET[:-1, -1].copy()
        depth_KT = np.empty(ids_KT.shape, np.int64)
        for row, ids_T in enumerate(ids_KT):
            own_T = before_ET[np.maximum(ids_T, 0), np.arange(tokens)]
            later_T = np.add.reduce((before_ET > own_T).view(np.uint8), axis=0, dtype=count)
            depth_KT[row] = np.where(own_T > 0, later_T, num_experts)
        found.append(depth_KT.T[ids_KT.T >= 0])
    return np.concatenate(found) if found else np.empty(0, np.int64)
