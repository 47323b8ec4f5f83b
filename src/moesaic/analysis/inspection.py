"""All that a trace and a model tell about the experts, as one object: the page, the plots and --json show it.

T tokens, E experts, C sources.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from moesaic.analysis import specialisation as special
from moesaic.analysis.coactivation import coactivation, lift, partners
from moesaic.analysis.locality import hit_curve
from moesaic.analysis.movement import movement, require_comparable
from moesaic.analysis.similarity import Similarity
from moesaic.analysis.token_types import TOKEN_TYPES, types_of
from moesaic.analysis.trace import LayerRows, Trace
from moesaic.analysis.typical import context, typical_places, typical_tokens
from moesaic.analysis.usage import usage

TYPICAL_TOKENS = 12
CONTEXTS = 4
CONTEXT_TOKENS = 12
PARTNERS = 4
FEWEST_TOGETHER = 5
SEED = 0
"""Of the permutations."""


@dataclass(frozen=True)
class Labels:
    """A question that is asked of every expert: of which source, of which type, at which place are its tokens?"""

    name: str
    values: Sequence[str]
    of_token: np.ndarray
    """(T,), positions in `values`."""
    exchanged: special.Units | special.Blocks
    """What changes places in the baseline."""

    def information(self, rows: LayerRows) -> tuple[np.ndarray, special.Information]:
        arguments = (self.of_token, len(self.values), rows.flat, rows.num_experts)
        if isinstance(self.exchanged, special.Units):
            return special.information_of_units(*arguments, self.exchanged, SEED)
        return special.information_of_tokens(*arguments, self.exchanged, SEED)


@dataclass(frozen=True)
class Inspection:
    """Of one trace. Values are numbers, text, lists, dicts and arrays; `plain` has JSON values alone."""

    trace: Trace
    labels: Sequence[Labels]
    layers: Sequence[Mapping[str, Any]]
    """The keys of `usage`; `information`, `counts` and `overlap` by label; `coactivation` and `lift` (E, E), `onward`
    (E, E') lifts to the next layer; `hits` (E + 1,); `typical` and `contexts` by expert; `partners`;
    `weight_similarity`, `output_similarity`, `duplicates`; `movement`."""
    against: str | None = None
    about: Mapping[str, Any] = field(default_factory=dict)

    def plain(self) -> dict[str, Any]:
        """JSON values. Matrices of experts by experts are left out but for what stands out in them: `partners`,
        `duplicates`."""
        left_out = {"coactivation", "lift", "onward", "weight_similarity", "output_similarity", "contexts"}
        layers = [{key: value for key, value in layer.items() if key not in left_out} for layer in self.layers]
        for layer in layers:
            if "movement" in layer:
                layer["movement"] = {key: value for key, value in layer["movement"].items() if key != "flow"}
        return as_json({
            "model": self.trace.name,
            "tokens": len(self.trace),
            "sources": self.trace.sources,
            "token_types": list(TOKEN_TYPES),
            "labels": {labels.name: list(labels.values) for labels in self.labels},
            "against": self.against,
            "about": self.about,
            **self.totals(),
            "layers": layers,
        })  # fmt: skip

    def totals(self) -> dict[str, Any]:
        """Over all layers: `max_vio` (mean), `dead_experts`, `duplicate_experts`, `num_experts`, `top_share` (mean)."""
        return {
            "max_vio": float(np.mean([layer["max_vio"] for layer in self.layers])),
            "dead_experts": sum(len(layer["dead"]) for layer in self.layers),
            "duplicate_experts": sum(len(layer["duplicates"]) for layer in self.layers),
            "num_experts": sum(self.trace.num_experts),
            "load_entropy": float(np.mean([layer["load_entropy"] for layer in self.layers])),
        }


def inspect_trace(
    trace: Trace,
    *,
    similarities: Sequence[Similarity] = (),
    against: Trace | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Inspection:
    """Computes everything, one layer at a time.

    Args:
        similarities: of each layer, where the model is at hand.
        against: a trace of the same text, of another model.

    Raises UsageError where the two traces cannot be compared, MoesaicError where one is damaged.
    """
    if against is not None:
        require_comparable(trace, against)
    labels = labels_of(trace)
    layers = []
    for index in range(trace.num_layers):
        layer = _layer(trace, index, labels)
        layer |= _alike(similarities[index] if similarities else None)
        if against is not None:
            sources = trace.tokens.source_ids
            layer["movement"] = movement(trace.layer(index), against.layer(index), sources, len(trace.sources))
        layers.append(layer)
        progress(index + 1)
    return Inspection(trace, labels, layers, None if against is None else against.name)


def labels_of(trace: Trace) -> list[Labels]:
    """Source, token type and position. Without the tokens' texts their types are not known."""
    tokens = trace.tokens
    units = special.Units.of_text(tokens.document_ids, tokens.sequence_ids)
    blocks = special.Blocks.of_text(tokens.source_ids)
    turned = special.Blocks.of_text(tokens.source_ids, turned=True)
    found = [Labels("domain", trace.sources, tokens.source_ids.astype(np.int64), units)]
    if trace.vocabulary:
        types_T = types_of(tokens.token_ids, trace.vocabulary)
        found.append(Labels("token type", TOKEN_TYPES, types_T, blocks))
    # Powers of two: what a router does differently changes early in a text, if it does.
    level_T = np.frexp(tokens.positions.astype(np.float64))[1].astype(np.int64)
    found.append(Labels("position", [_stretch(level) for level in range(int(level_T.max()) + 1)], level_T, turned))
    return found


def as_json(value: Any) -> Any:
    """Arrays as lists, NaN and infinities as None, floats with six digits."""
    if isinstance(value, Mapping):
        return {key: as_json(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return as_json(value.tolist())
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    if isinstance(value, (float, np.floating)):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


def _layer(trace: Trace, index: int, labels: Sequence[Labels]) -> dict[str, Any]:
    rows, tokens = trace.layer(index), trace.tokens
    layer = usage(rows)
    load_E = layer["load"]
    judged = {label.name: label.information(rows) for label in labels}
    layer["counts"] = {name: counts for name, (counts, _) in judged.items()}
    layer["information"] = {name: asdict(information) for name, (_, information) in judged.items()}
    layer["overlap"] = special.overlap(layer["counts"]["domain"])
    layer["hits"] = hit_curve(rows.expert_ids, rows.num_experts)
    layer["coactivation"] = coactivation(rows)
    layer["lift"] = lift(layer["coactivation"], load_E, load_E, len(rows))
    others = layer["coactivation"] * (1 - np.eye(rows.num_experts, dtype=np.int64))
    layer["partners"] = partners(layer["lift"], others, PARTNERS, FEWEST_TOGETHER)
    if index + 1 < trace.num_layers:
        after = trace.layer(index + 1)
        together = coactivation(rows, after)
        next_load = np.bincount(after.flat[1], minlength=after.num_experts)
        layer["onward"] = lift(together, load_E, next_load, len(rows))
        layer["onward_partners"] = partners(layer["onward"], together, PARTNERS, FEWEST_TOGETHER)
    typical = typical_tokens(tokens.token_ids, rows, TYPICAL_TOKENS)
    layer["typical"] = [[_told(token, trace) for token in of_expert] for of_expert in typical]
    layer["contexts"] = [
        [
            {"token": place, "source": int(tokens.source_ids[place]), "text": context(
                tokens, trace.vocabulary, place, CONTEXT_TOKENS, CONTEXT_TOKENS)}
            for place in places
        ]
        for places in typical_places(tokens.token_ids, rows, CONTEXTS)
    ]  # fmt: skip
    return layer


def _alike(similarity: Similarity | None) -> dict[str, Any]:
    if similarity is None:
        return {"duplicates": []}
    weights_EE, outputs_EE = similarity.weights.numpy(), similarity.outputs.numpy()
    return {
        "weight_similarity": weights_EE,
        "output_similarity": outputs_EE,
        "compared": similarity.compared,
        "numbers": similarity.numbers,
        "duplicates": [
            {"experts": [i, j], "weights": weights_EE[i, j], "outputs": outputs_EE[i, j]}
            for i, j in similarity.duplicates()
        ],
    }


def _told(token: Any, trace: Trace) -> dict[str, Any]:
    text = trace.vocabulary.get(token.token_id, b"").decode("utf-8", "replace")
    return {"token_id": token.token_id, "text": text, "count": token.count, "lift": token.lift}


def _stretch(level: int) -> str:
    low, high = (0, 0) if level == 0 else (2 ** (level - 1), 2**level - 1)
    return f"{low}" if low == high else f"{low}–{high}"
