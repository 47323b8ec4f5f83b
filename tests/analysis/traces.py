"""Traces of planted routing. T tokens, E experts, K experts per token."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from moesaic.analysis.trace import Trace, read_trace
from moesaic.analysis.trace_writer import TokenRows, TraceWriter
from moesaic.ops import Routing


def routing_of(ids: np.ndarray, num_experts: int, weights: np.ndarray | None = None) -> Routing:
    """From (T, K); weights are drawn, those of a token in falling order."""
    num_tokens, top_k = ids.shape
    if weights is None:
        weights = -np.sort(-np.random.rand(num_tokens, top_k)) + 0.01
    return Routing(
        token_ids=torch.arange(num_tokens).repeat_interleave(top_k),
        expert_ids=torch.from_numpy(ids.reshape(-1).astype(np.int64)),
        weights=torch.from_numpy(weights.reshape(-1).astype(np.float32)),
        logits=torch.randn(num_tokens, num_experts),
        num_experts=num_experts,
        top_k=top_k,
    )


def rows_of(
    token_ids: np.ndarray, *, sources: np.ndarray | None = None, length: int = 50, document: int = 100
) -> TokenRows:
    """Sequences of `length` tokens and documents of `document` tokens."""
    places = np.arange(len(token_ids))
    return TokenRows(
        token_ids=token_ids,
        source_ids=np.zeros(len(token_ids), np.int64) if sources is None else sources,
        document_ids=places // document,
        sequence_ids=places // length,
        positions=places % length,
        text_offsets=places,
    )


def write_trace(
    directory: Path,
    layers: Sequence[np.ndarray],
    num_experts: int,
    *,
    token_ids: np.ndarray | None = None,
    sources: np.ndarray | None = None,
    names: Sequence[str] = ("all",),
    weights: Sequence[np.ndarray] | None = None,
    length: int = 50,
    document: int = 100,
    pieces: int = 3,
) -> Trace:
    """Of expert ids (T, K) by layer, written in several passes."""
    num_tokens = len(layers[0])
    token_ids = np.random.randint(0, 256, num_tokens) if token_ids is None else token_ids
    text = rows_of(token_ids, sources=sources, length=length, document=document)
    writer = TraceWriter(
        directory,
        num_experts=[num_experts] * len(layers),
        sources=list(names),
        about={"model": "planted"},
        token_bytes=lambda token_id: bytes([token_id % 256]),
    )
    with writer:
        for part in np.array_split(np.arange(num_tokens), pieces):
            rows = TokenRows(**{name: getattr(text, name)[part] for name in text.__dataclass_fields__})
            writer.add(rows, [
                routing_of(ids[part], num_experts, None if weights is None else weights[layer][part])
                for layer, ids in enumerate(layers)
            ])  # fmt: skip
    return read_trace(directory)


def random_ids(num_tokens: int, num_experts: int, top_k: int, stickiness: float = 0.0) -> np.ndarray:
    """(T, K), different experts in a row; with stickiness a token often keeps the experts of the one before it."""
    ids = np.argsort(np.random.rand(num_tokens, num_experts), axis=1)[:, :top_k]
    for token in np.flatnonzero(np.random.rand(num_tokens) < stickiness):
        if token:
            ids[token] = np.random.permutation(ids[token - 1])
    return ids
