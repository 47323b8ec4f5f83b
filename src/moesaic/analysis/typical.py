"""What an expert is fond of: tokens that it gets more often than others do, and places in the text.

T tokens, E experts, V tokens of the vocabulary that occur.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from moesaic.analysis.trace import LayerRows, TokenRows

_MOST_CELLS = 2**22
"""V x E that are counted at once; beyond, the rarest tokens are left out."""
_SAMPLED_TOKENS = 2**16
FEWEST_USES = 3


@dataclass(frozen=True)
class TypicalToken:
    token_id: int
    count: int
    """Rows of the expert that are this token."""
    lift: float
    """Share among the expert's rows over its share among all rows."""


def typical_tokens(token_ids: np.ndarray, rows: LayerRows, number: int) -> list[list[TypicalToken]]:
    """For each expert its tokens of the greatest count x log(lift), what they add to the information of both."""
    ids_V, index_T = np.unique(token_ids, return_inverse=True)
    token_N, expert_N = rows.flat
    most = max(1, _MOST_CELLS // rows.num_experts)
    if len(ids_V) > most:
        frequent_V = np.sort(np.argsort(-np.bincount(index_T), kind="stable")[:most])
        new_index_V = np.full(len(ids_V), -1)
        new_index_V[frequent_V] = np.arange(most)
        ids_V, index_T = ids_V[frequent_V], new_index_V[index_T]
    index_N = index_T[token_N]
    kept_N = index_N >= 0
    counts_VE = np.bincount(
        index_N[kept_N] * rows.num_experts + expert_N[kept_N], minlength=len(ids_V) * rows.num_experts
    ).reshape(len(ids_V), rows.num_experts)
    load_E = np.bincount(expert_N, minlength=rows.num_experts)
    expected_VE = np.outer(counts_VE.sum(1), load_E / max(1, len(expert_N)))
    lift_VE = np.divide(counts_VE, expected_VE, out=np.zeros(counts_VE.shape), where=expected_VE > 0)
    score_VE = np.where(counts_VE >= FEWEST_USES, counts_VE * np.log(np.maximum(lift_VE, 1)), 0)
    best_VE = np.argsort(-score_VE, axis=0, kind="stable")[:number]
    return [
        [
            TypicalToken(int(ids_V[v]), int(counts_VE[v, expert]), float(lift_VE[v, expert]))
            for v in best_VE[:, expert]
            if score_VE[v, expert] > 0
        ]
        for expert in range(rows.num_experts)
    ]


def typical_places(token_ids: np.ndarray, rows: LayerRows, number: int) -> list[list[int]]:
    """For each expert the numbers of tokens that gave it the greatest weight, each of another token id."""
    step = max(1, -(-len(rows) // _SAMPLED_TOKENS))
    sampled = np.arange(0, len(rows), step)
    ids_TK, weights_TK = rows.expert_ids[sampled], rows.weights[sampled]
    token_N = np.repeat(sampled, ids_TK.shape[1])
    chosen_N = ids_TK.reshape(-1) >= 0
    token_N, expert_N = token_N[chosen_N], ids_TK.reshape(-1)[chosen_N].astype(np.int64)
    order_N = np.lexsort((-weights_TK.reshape(-1)[chosen_N], expert_N))
    edges = np.searchsorted(expert_N[order_N], np.arange(rows.num_experts + 1))
    return [
        _of_different_tokens(token_N[order_N[low:high]], token_ids, number) for low, high in pairwise(edges.tolist())
    ]


def context(tokens: TokenRows, vocabulary: Mapping[int, bytes], place: int, before: int, after: int) -> tuple[str, ...]:
    """Text before a token, of it, and after it, in its sequence; bytes that are not whole characters become U+FFFD."""
    low, high = max(0, place - before), min(len(tokens), place + after + 1)
    around = np.arange(low, high)
    same = tokens.sequence_ids[low:high] == tokens.sequence_ids[place]
    parts = (around[same & (around < place)], [place], around[same & (around > place)])
    return tuple(
        b"".join(vocabulary.get(int(token_id), b"") for token_id in tokens.token_ids[part]).decode("utf-8", "replace")
        for part in parts
    )


def _of_different_tokens(places: np.ndarray, token_ids: np.ndarray, number: int) -> list[int]:
    found: dict[int, int] = {}
    for place in places.tolist():
        found.setdefault(int(token_ids[place]), place)
        if len(found) == number:
            break
    return list(found.values())
