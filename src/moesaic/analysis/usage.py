"""How much each expert of a layer is used, how evenly, and how sure the router was.

T tokens, E experts, K experts per token.
"""

from typing import Any

import numpy as np
import torch

from moesaic.analysis.trace import LayerRows
from moesaic.model.balance import max_vio


def usage(rows: LayerRows) -> dict[str, Any]:
    """Numbers of one layer.

    `load` (E,) rows of each expert; `weight` (E,) mean weight of its rows, None without any; `max_vio`; `load_entropy`,
    1 where all have the same load and 0 where one has all; `dead`, experts without a row; `experts_per_token`.

    Of the router's confidence: `top_share`, mean over tokens of the largest weight's share of all a token's weights;
    `top_share_histogram` in ten equal bins from 0 to 1; with logits `margin`, the mean of how far the last chosen
    expert's logit is above the best one that was not chosen; None where something else than logits had a say.
    """
    _, expert_N = rows.flat
    weight_N = rows.weights.reshape(-1)[rows.expert_ids.reshape(-1) >= 0]
    load_E = np.bincount(expert_N, minlength=rows.num_experts)
    weight_E = np.bincount(expert_N, weight_N, minlength=rows.num_experts)
    share_T = top_shares(rows)
    return {
        "load": load_E,
        "weight": [float(total) / int(count) if count else None for total, count in zip(weight_E, load_E, strict=True)],
        "max_vio": max_vio(torch.from_numpy(load_E)),
        "load_entropy": relative_entropy(load_E),
        "dead": np.flatnonzero(load_E == 0),
        "experts_per_token": len(expert_N) / max(1, len(rows)),
        "top_share": float(share_T.mean()) if len(share_T) else None,
        "top_share_histogram": np.histogram(share_T, bins=10, range=(0.0, 1.0))[0],
        "margin": _margin(rows),
    }


def top_shares(rows: LayerRows) -> np.ndarray:
    """The largest weight's share of each token that has any; 1 / K where the router is in two minds."""
    magnitude_TK = np.abs(rows.weights)
    total_T = magnitude_TK.sum(1)
    return (magnitude_TK.max(1) / np.where(total_T > 0, total_T, 1))[total_T > 0]


def relative_entropy(counts: np.ndarray) -> float:
    """Entropy of counts over that of even ones."""
    if len(counts) < 2 or not counts.sum():
        return 1.0 if len(counts) else 0.0
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log(share)).sum() / np.log(len(counts)))


def _margin(rows: LayerRows) -> float | None:
    if rows.logits is None or rows.expert_ids.shape[1] >= rows.num_experts or (rows.expert_ids < 0).any():
        return None
    chosen_TK = np.take_along_axis(rows.logits, rows.expert_ids.astype(np.int64), 1)
    others_TE = rows.logits.copy()
    np.put_along_axis(others_TE, rows.expert_ids.astype(np.int64), -np.inf, axis=1)
    margin_T = chosen_TK.min(1) - others_TE.max(1)
    return float(margin_T.mean()) if (margin_T >= 0).all() else None
