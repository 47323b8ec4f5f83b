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
    caches = CacheCurve(num_experts)
    caches.add(expert_ids)
    return caches.hits


class CacheCurve:
    """The curve of one layer while its tokens come, a part at a time."""

    def __init__(self, num_experts: int) -> None:
        self.hits = np.zeros(num_experts + 1, np.int64)
        """(E + 1,), as `hit_curve` gives it for what came so far."""
        self._last_use_E = np.zeros(num_experts, np.int32)
        """The order in which the experts were used last, from 1; 0 for never."""

    def add(self, expert_ids: np.ndarray) -> None:
        """The next tokens, (T, K)."""
        num_experts = len(self._last_use_E)
        step = max(1, _CELLS_AT_ONCE // num_experts)
        for first in range(0, len(expert_ids), step):
            depths = self._depths(expert_ids[first : first + step])
            self.hits[1:] += np.cumsum(np.bincount(depths[depths < num_experts], minlength=num_experts))

    def _depths(self, expert_ids: np.ndarray) -> np.ndarray:
        """(N,): how many experts were used more recently than the row's, before its token; E for a first use. Rows that
        are -1 are left out."""
        num_experts = len(self._last_use_E)
        ids_KT = np.ascontiguousarray(expert_ids.T.astype(np.int64))
        width, tokens = ids_KT.shape
        # Column t + 1 holds the uses until token t, so that column t is what was known before it. The last row takes
        # what is absent. Tokens lie side by side, which lets a processor compare many at a time.
        used_ET = np.zeros((num_experts + 1, tokens + 1), np.int32)
        used_ET[:-1, 0] = self._last_use_E
        times_KT = num_experts + 1 + np.arange(tokens) * width + np.arange(width)[:, None]
        used_ET[np.where(ids_KT < 0, num_experts, ids_KT), np.arange(1, tokens + 1)] = times_KT
        np.maximum.accumulate(used_ET, axis=1, out=used_ET)
        before_ET = used_ET[:-1, :-1]
        depth_KT = np.empty(ids_KT.shape, np.int64)
        count = np.uint8 if num_experts < 2**8 else np.uint16
        for row, ids_T in enumerate(ids_KT):
            own_T = before_ET[np.maximum(ids_T, 0), np.arange(tokens)]
            later_T = np.add.reduce((before_ET > own_T).view(np.uint8), axis=0, dtype=count)
            depth_KT[row] = np.where(own_T > 0, later_T, num_experts)
        last_E = used_ET[:-1, -1]
        # Only their order matters, so that times never grow beyond a part's.
        self._last_use_E[np.argsort(last_E, kind="stable")] = np.arange(1, num_experts + 1)
        self._last_use_E[last_E == 0] = 0
        return depth_KT.T[ids_KT.T >= 0]
