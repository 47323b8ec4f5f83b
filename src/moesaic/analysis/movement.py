"""How routing moved between two traces of the same text: two checkpoints, or one in two precisions.

T tokens, E experts, K experts per token.
"""

from typing import Any

import numpy as np

from moesaic.analysis.trace import LayerRows, Trace
from moesaic.errors import UsageError

_TOKENS_AT_ONCE = 2**15


def require_comparable(one: Trace, other: Trace) -> None:
    """Raises UsageError unless both are of the same tokens and of layers with as many experts."""
    if one.num_experts != other.num_experts:
        shown = " and ".join(
            f"{trace.num_layers} layers of {'/'.join(map(str, sorted(set(trace.num_experts))))}"
            for trace in (one, other)
        )
        raise UsageError(f"{one.name} and {other.name} have {shown} experts; compare models of one shape")
    if len(one) != len(other):
        raise UsageError(f"the traces have {len(one):,} and {len(other):,} tokens; record both on the same text")
    if not np.array_equal(one.tokens.token_ids, other.tokens.token_ids):
        place = int((one.tokens.token_ids != other.tokens.token_ids).argmax())
        raise UsageError(f"the traces differ in token {place:,} of the text; record both on the same text")


def movement(one: LayerRows, other: LayerRows, sources: np.ndarray, num_sources: int) -> dict[str, Any]:
    """Of one layer: `changed`, share of tokens whose set of experts is another; `changed_by_source`; `first_changed`,
    of those whose expert of the greatest weight is another; `kept`, mean share of a token's experts that stayed;
    `load_shift`, half the sum of how much each expert's share of the load changed, 1 when all load moved; `load_change`
    (E,), the change of each expert's share; `flow` (E, E), tokens that left an expert (rows) and came to one (columns).
    """
    changed_T, kept_T = np.zeros(len(one), bool), np.ones(len(one))
    flow_EE = np.zeros((one.num_experts, one.num_experts))
    for low in range(0, len(one), _TOKENS_AT_ONCE):
        high = low + _TOKENS_AT_ONCE
        before_TE, after_TE = one.chosen(low, high), other.chosen(low, high)
        common_T = (before_TE * after_TE).sum(1)
        size_T = np.maximum(before_TE.sum(1), after_TE.sum(1))
        changed_T[low:high] = common_T < size_T
        kept_T[low:high] = np.divide(common_T, size_T, out=np.ones_like(common_T), where=size_T > 0)
        left_TE = before_TE * (1 - after_TE)
        came_TE = after_TE * (1 - before_TE)
        flow_EE += left_TE.T @ (came_TE / np.maximum(1, came_TE.sum(1, keepdims=True)))
    shares = [np.bincount(rows.flat[1], minlength=one.num_experts) / max(1, len(rows.flat[1])) for rows in (one, other)]
    tokens_C = np.bincount(sources, minlength=num_sources)
    return {
        "changed": float(changed_T.mean()),
        "changed_by_source": np.bincount(sources, changed_T, minlength=num_sources) / np.maximum(1, tokens_C),
        "first_changed": float((_first(one) != _first(other)).mean()),
        "kept": float(kept_T.mean()),
        "load_shift": float(np.abs(shares[1] - shares[0]).sum() / 2),
        "load_change": shares[1] - shares[0],
        "flow": flow_EE,
    }


def _first(rows: LayerRows) -> np.ndarray:
    """(T,): the expert of the greatest weight, -1 for none."""
    best_T1 = np.where(rows.expert_ids < 0, -1, np.abs(rows.weights)).argmax(1)[:, None]
    return np.take_along_axis(rows.expert_ids, best_T1, 1)[:, 0]
