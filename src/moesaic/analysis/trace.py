"""Recorded routing, as it lies on disk: `trace_writer.py` says in which form.

    trace = read_trace("runs/trace")
    frame = pandas.DataFrame(trace.columns(layer=0))      # a row for each token and expert

T tokens, E experts, K experts per token, N assignments.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moesaic.analysis.trace_writer import FORMAT, HEAD, TOKEN_COLUMNS, VERSION, VOCABULARY, TokenRows, joined
from moesaic.errors import MoesaicError, UsageError
from moesaic.safetensors_file import DTYPES, SafetensorsFile
from moesaic.weights_io import read_json, sha256_of


@dataclass(frozen=True)
class LayerRows:
    """What one layer's router decided for T tokens."""

    expert_ids: np.ndarray
    """(T, K) int16, -1 where a token has fewer than K experts."""
    weights: np.ndarray
    """(T, K) float32, 0 there."""
    logits: np.ndarray | None
    """(T, E) float32, where they were recorded."""
    num_experts: int

    def __len__(self) -> int:
        return len(self.expert_ids)

    @cached_property
    def flat(self) -> tuple[np.ndarray, np.ndarray]:
        """Token numbers and expert ids of all N assignments, both int64."""
        expert_N = self.expert_ids.reshape(-1).astype(np.int64)
        token_N = np.repeat(np.arange(len(self)), self.expert_ids.shape[1])
        chosen_N = expert_N >= 0
        return (token_N, expert_N) if chosen_N.all() else (token_N[chosen_N], expert_N[chosen_N])

    def chosen(self, first: int, last: int) -> np.ndarray:
        """(last - first, E) float32: 1 where a token goes to an expert."""
        ids_TK = self.expert_ids[first:last]
        mask_TE = np.zeros((len(ids_TK), self.num_experts + 1), np.float32)  # the last column takes what is absent
        np.put_along_axis(mask_TE, np.where(ids_TK < 0, self.num_experts, ids_TK).astype(np.int64), 1, axis=1)
        return mask_TE[:, :-1]


def is_trace(path: str | Path) -> bool:
    """Whether a path is a directory that says it is a trace."""
    return (Path(path) / HEAD).is_file()


def read_trace(directory: str | Path) -> "Trace":
    """Opens a trace, every byte of it checked.

    Raises UsageError where there is none, MoesaicError, naming the file, where it is damaged.
    """
    directory = Path(directory)
    if not is_trace(directory):
        raise UsageError(f"{directory} holds no {HEAD}; record one with: moesaic inspect MODEL --data FILE --trace DIR")
    head = read_json(directory / HEAD)
    try:
        if head["format"] != FORMAT or head["version"] != VERSION:
            raise UsageError(f"{directory / HEAD} is of format {head['format']!r} {head['version']}; record it anew")
        digests = {str(shard["file"]): shard["sha256"] for shard in head["shards"]}
        counted = sum(int(shard["num_tokens"]) for shard in head["shards"])
        complete = all(isinstance(head[key], list) for key in ("num_experts", "sources"))
        if complete and not counted:
            raise UsageError(f"{directory} is a trace of no tokens; record one of some text")
        if not complete or counted != head["num_tokens"] or any("/" in name for name in digests):
            raise KeyError("num_tokens")
    except (KeyError, TypeError, ValueError) as error:
        raise MoesaicError(f"{directory / HEAD} is damaged ({error}); record the trace anew") from error
    if "vocabulary_sha256" in head:
        digests[VOCABULARY] = head["vocabulary_sha256"]
    for name, digest in digests.items():
        path = directory / name
        if not path.is_file():
            raise MoesaicError(f"{path} is missing; copy or record the trace anew")
        if sha256_of(path) != digest:
            raise MoesaicError(f"{path} is damaged: its checksum differs from {HEAD}'s; copy or record the trace anew")
    return Trace(directory, head)


class Trace:
    """A trace whose files were found whole. Layers are read when asked for, one at a time."""

    def __init__(self, directory: Path, head: dict[str, Any]) -> None:
        self.directory, self.head = directory, head
        self.num_experts: list[int] = [int(number) for number in head["num_experts"]]
        """Of each layer."""
        self.sources: list[str] = [str(name) for name in head["sources"]]
        self.with_logits = bool(head.get("with_logits"))
        self._layer = lru_cache(maxsize=2)(self._read_layer)

    def __len__(self) -> int:
        """Tokens."""
        return int(self.head["num_tokens"])

    @property
    def num_layers(self) -> int:
        return len(self.num_experts)

    @property
    def name(self) -> str:
        return str(self.head.get("model") or self.directory)

    @cached_property
    def tokens(self) -> TokenRows:
        return TokenRows(**{name: self._column(name) for name in TOKEN_COLUMNS})

    def layer(self, layer: int) -> LayerRows:
        """The two layers that were asked for last stay in memory."""
        return self._layer(layer)

    def columns(self, layer: int) -> dict[str, np.ndarray]:
        """Named columns with a row for each of N assignments, as pandas.DataFrame takes them.

        `token` counts the tokens of the trace, `rank` the experts of a token; `expert` and `weight` are the decision;
        `token_id`, `source`, `document`, `sequence`, `position` and `text_offset` are the token's.
        """
        rows = self.layer(layer)
        token_N = np.repeat(np.arange(len(rows)), rows.expert_ids.shape[1])
        rank_N = np.tile(np.arange(rows.expert_ids.shape[1]), len(rows))
        chosen_N = rows.expert_ids.reshape(-1) >= 0
        token_N = token_N[chosen_N]
        own = {name.removesuffix("s"): getattr(self.tokens, name)[token_N] for name in TOKEN_COLUMNS}
        decision = {"expert": rows.expert_ids.reshape(-1)[chosen_N], "weight": rows.weights.reshape(-1)[chosen_N]}
        renamed = {name.removesuffix("_id") if name != "token_id" else name: column for name, column in own.items()}
        renamed["source"] = np.array(self.sources)[renamed["source"]]
        return {"token": token_N, "rank": rank_N[chosen_N], **decision, **renamed}

    @cached_property
    def vocabulary(self) -> dict[int, bytes]:
        """The bytes of each token that occurs; empty where the trace was written without."""
        if "vocabulary_sha256" not in self.head:
            return {}
        file = SafetensorsFile(self.directory / VOCABULARY)
        try:
            ids, ends, text = (self._read(file, name) for name in ("token_ids", "ends", "bytes"))
        finally:
            file.close()
        whole, starts = text.tobytes(), [0, *ends[:-1].tolist()]
        return {
            token_id: whole[start:end] for token_id, start, end in zip(ids.tolist(), starts, ends.tolist(), strict=True)
        }

    def _read_layer(self, layer: int) -> LayerRows:
        prefix = f"layer.{layer}"
        return LayerRows(
            expert_ids=self._column(f"{prefix}.expert_ids"),
            weights=self._column(f"{prefix}.weights"),
            logits=self._column(f"{prefix}.logits") if self.with_logits else None,
            num_experts=self.num_experts[layer],
        )

    def _column(self, name: str) -> np.ndarray:
        parts = []
        for shard in self.head["shards"]:
            file = SafetensorsFile(self.directory / shard["file"])
            try:
                parts.append(torch.from_numpy(self._read(file, name)))
            finally:
                file.close()
        return joined(parts).numpy()

    @staticmethod
    def _read(file: SafetensorsFile, name: str) -> np.ndarray:
        entry = file.entries.get(name)
        if entry is None:
            raise MoesaicError(f"{file.path} has no tensor {name}; record the trace anew")
        target = torch.empty(entry.shape, dtype=DTYPES[entry.type])
        file.read_elements(name, 0, target)
        return target.numpy()
