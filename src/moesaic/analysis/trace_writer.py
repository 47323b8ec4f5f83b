"""Routing on its way to disk: what `trace.py` reads, written while a model runs.

A trace is a directory. `trace.json` says what it is of, how often each expert was used (`tokens_per_expert`), and how
often an LRU cache of 0 ... E experts of each layer would have had what a token needs (`cache_hits`); each
`trace-NNNNN.safetensors` holds the next tokens, in order:

    token_ids, source_ids, document_ids, sequence_ids, positions    (T,) int32
    text_offsets                (T,) int64, bytes of the source's text before the token
    layer.M.expert_ids          (T, K) int16, -1 where a token has fewer than K experts
    layer.M.weights             (T, K) float32, 0 there
    layer.M.logits              (T, E) float32, where they were asked for

`vocabulary.safetensors` holds the bytes of the tokens that occur. K may differ from shard to shard where the router
lets it; what the directory holds is the same for every family of models.

T tokens, E experts, K experts per token, N assignments.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moesaic.analysis.locality import CacheCurve
from moesaic.errors import UsageError
from moesaic.ops import Routing
from moesaic.weights_io import atomic_directory, write_json, write_safetensors

FORMAT, VERSION = "moesaic routing trace", 1
HEAD, VOCABULARY = "trace.json", "vocabulary.safetensors"
SHARD_BYTES = 16 * 2**20
"""Of routing that is kept in memory before it is written."""


@dataclass(frozen=True)
class TokenRows:
    """Where T tokens come from: a row each, all (T,) integers."""

    token_ids: np.ndarray
    source_ids: np.ndarray
    """A position in the trace's list of sources."""
    document_ids: np.ndarray
    """Counted over all sources: what was written as one text."""
    sequence_ids: np.ndarray
    """Counted over all sources: tokens that see each other."""
    positions: np.ndarray
    """In the sequence, from 0."""
    text_offsets: np.ndarray
    """Bytes of the source's text before the token."""

    def __len__(self) -> int:
        return len(self.token_ids)

    def __getitem__(self, which: slice | np.ndarray) -> "TokenRows":
        """Some of the rows."""
        return TokenRows(**{field.name: getattr(self, field.name)[which] for field in fields(TokenRows)})


TOKEN_COLUMNS = {
    field.name: torch.int64 if field.name == "text_offsets" else torch.int32 for field in fields(TokenRows)
}


class TraceWriter(AbstractContextManager["TraceWriter"]):
    """`with TraceWriter(directory, ...) as writer: writer.add(rows, routings)`, once for each forward pass.

    The directory appears when the block ends, whole, or not at all. Memory is bounded by one pass and SHARD_BYTES.

    Args:
        num_experts: of each layer.
        sources: names that source_ids stand for.
        about: further values for trace.json: `model` and `tokenizer`, say.
        token_bytes: gives the bytes of a token, for who reads the trace without the tokenizer.
        with_logits: keep the logits too, E numbers for each token and layer.

    Raises:
        UsageError: the directory exists and is not a trace.
        MoesaicError: it cannot be written.
    """

    def __init__(
        self,
        directory: Path,
        *,
        num_experts: Sequence[int],
        sources: Sequence[str],
        about: Mapping[str, Any] | None = None,
        token_bytes: Callable[[int], bytes] | None = None,
        with_logits: bool = False,
    ) -> None:
        require_place(directory)
        self._directory = directory
        self._num_experts, self._sources, self._about = list(num_experts), list(sources), dict(about or {})
        self._load = [np.zeros(number, np.int64) for number in num_experts]
        self._caches = [CacheCurve(number) for number in num_experts]
        self._token_bytes, self._with_logits = token_bytes, with_logits
        self._pending: list[dict[str, Tensor]] = []
        self._pending_bytes = 0
        self._shards: list[dict[str, Any]] = []
        self._occurring = np.empty(0, np.int64)
        self._stack = ExitStack()

    def __enter__(self) -> "TraceWriter":
        with ExitStack() as stack:
            self._temporary = stack.enter_context(atomic_directory(self._directory))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        try:
            if kind is None:
                self._finish()
        except BaseException as failure:
            self._stack.__exit__(type(failure), failure, failure.__traceback__)
            raise
        self._stack.__exit__(kind, error, traceback)

    def add(self, rows: TokenRows, routings: Sequence[Routing]) -> None:
        """The tokens of a forward pass, in its order, and what each layer decided. Padding is left out."""
        for layer, routing in enumerate(routings):
            if routing.num_tokens != len(rows):
                raise ValueError(f"layer {layer} routed {routing.num_tokens} tokens, and {len(rows)} are told")
        mask = None if not routings else routings[0].mask
        kept = slice(None) if mask is None else mask.cpu().numpy().astype(bool)
        chosen = [(ids_TK[kept], weights_TK[kept]) for ids_TK, weights_TK in map(by_token, routings)]
        logits = [routing.logits.detach().float().cpu()[kept] for routing in routings] if self._with_logits else None
        self.add_chosen(rows[kept], chosen, logits)

    def add_chosen(
        self, rows: TokenRows, chosen: Sequence[tuple[Tensor, Tensor]], logits: Sequence[Tensor] | None = None
    ) -> None:
        """The same as `by_token` tells it: for each layer expert ids and weights (T, K), and logits (T, E)."""
        if len(chosen) != len(self._num_experts):
            raise ValueError(f"{len(chosen)} layers of routing for a trace of {len(self._num_experts)}")
        columns = {
            name: torch.from_numpy(np.ascontiguousarray(getattr(rows, name))).to(dtype)
            for name, dtype in TOKEN_COLUMNS.items()
        }
        for layer, (ids_TK, weights_TK) in enumerate(chosen):
            columns[f"layer.{layer}.expert_ids"] = ids_TK
            self._caches[layer].add(ids_TK.numpy())
            columns[f"layer.{layer}.weights"] = weights_TK
            chosen_N = ids_TK[ids_TK >= 0].numpy()
            self._load[layer] += np.bincount(chosen_N, minlength=self._num_experts[layer])
            if logits is not None:
                columns[f"layer.{layer}.logits"] = logits[layer]
        self._pending.append(columns)
        self._pending_bytes += sum(column.nbytes for column in columns.values())
        if self._pending_bytes >= SHARD_BYTES:
            self._write_shard()

    def _write_shard(self) -> None:
        columns = {name: joined([part[name] for part in self._pending]) for name in self._pending[0]}
        self._pending, self._pending_bytes = [], 0
        self._occurring = np.union1d(self._occurring, columns["token_ids"].numpy())
        name = f"trace-{len(self._shards) + 1:05d}.safetensors"
        digest = write_safetensors(self._temporary / name, columns)
        self._shards.append({"file": name, "num_tokens": len(columns["token_ids"]), "sha256": digest.sha256})

    def _finish(self) -> None:
        if self._pending:
            self._write_shard()
        head: dict[str, Any] = {"format": FORMAT, "version": VERSION, **self._about}
        head |= {
            "num_tokens": sum(shard["num_tokens"] for shard in self._shards),
            "num_experts": self._num_experts,
            "tokens_per_expert": [load_E.tolist() for load_E in self._load],
            "cache_hits": [cache.hits.tolist() for cache in self._caches],
            "with_logits": self._with_logits,
            "sources": self._sources,
            "shards": self._shards,
        }
        if self._token_bytes is not None and len(self._occurring):
            texts = [self._token_bytes(int(token_id)) for token_id in self._occurring]
            vocabulary = {
                "token_ids": torch.from_numpy(self._occurring).to(torch.int32),
                "ends": torch.tensor(np.cumsum([len(text) for text in texts]), dtype=torch.int64),
                "bytes": torch.from_numpy(np.frombuffer(b"".join(texts), np.uint8).copy()),
            }
            head["vocabulary_sha256"] = write_safetensors(self._temporary / VOCABULARY, vocabulary).sha256
        write_json(self._temporary / HEAD, head)


def require_place(directory: Path) -> None:
    """Raises UsageError where something is that is no trace: traces are replaced, nothing else is."""
    if directory.exists() and not (directory / HEAD).is_file():
        raise UsageError(f"{directory} exists and is not a trace; name another folder")


def by_token(routing: Routing) -> tuple[Tensor, Tensor]:
    """Expert ids (T, K) int16 and weights (T, K) float32 of any routing, on the CPU; -1 and 0 in empty places."""
    ids_N, weights_N = routing.expert_ids.detach().cpu(), routing.weights.detach().float().cpu()
    if routing.top_k is not None:
        return ids_N.view(-1, routing.top_k).to(torch.int16), weights_N.view(-1, routing.top_k)
    token_N = routing.token_ids.cpu()
    order_N = torch.argsort(token_N, stable=True)
    token_N = token_N[order_N]
    count_T = torch.bincount(token_N, minlength=routing.num_tokens)
    first_T = torch.cumsum(count_T, 0) - count_T
    rank_N = torch.arange(len(token_N)) - first_T[token_N]
    width = max(1, int(count_T.max())) if len(token_N) else 1
    ids_TK = torch.full((routing.num_tokens, width), -1, dtype=torch.int16)
    weights_TK = torch.zeros(routing.num_tokens, width)
    ids_TK[token_N, rank_N] = ids_N[order_N].to(torch.int16)
    weights_TK[token_N, rank_N] = weights_N[order_N]
    return ids_TK, weights_TK


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Rows one after another; narrower expert ids are widened with -1, narrower weights with 0."""
    if parts[0].ndim == 1:
        return torch.cat(list(parts))
    width = max(part.shape[1] for part in parts)
    absent = -1 if parts[0].dtype == torch.int16 else 0
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1]), value=absent) for part in parts])
