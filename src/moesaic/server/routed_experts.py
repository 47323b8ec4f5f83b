"""The experts of each token as SGLang tells them, and their weights beside them.

`sgl_ext.routed_experts` is base64 of int32, in the order tokens × layers of experts × K, for all tokens of prompt and
text but the last, which no expert has seen; `routed_weights` is float32 in the same order, and `routed_shape` has the
three numbers. Where tokens have different numbers of experts, -1 with weight 0 fills the rows. In a stream each chunk
has those of its own tokens; the first one begins with the prompt's.
"""

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from moesaic.engine.request import PromptReport, Token, TokenRouting


def first_told(start: int | None, prompt_tokens: int) -> int:
    """The first token that is told, for `Request.routed_from`. -1 stands for the prompt's last, which chooses the first
    token of the answer: a prompt that is not told may be known already."""
    return prompt_tokens - 1 if start == -1 else start or 0


class RoutedExperts:
    """`sgl_ext` of one choice, part by part, from token number `start` on."""

    def __init__(self, start: int | None = None) -> None:
        self._start, self._left_out = start or 0, 0

    def of(self, prompt: PromptReport | None, tokens: Sequence[Token]) -> dict[str, Any] | None:
        """None where nothing is known."""
        known: list[TokenRouting] = []
        if prompt is not None:  # whose first tokens the engine has left out
            known += prompt.routing or ()
            self._left_out = max(0, self._start - (prompt.num_tokens - 1))
        known += [token.routing for token in tokens if token.routing is not None]
        left_out = min(self._left_out, len(known))
        self._left_out -= left_out
        return encode_routing(known[left_out:])


def encode_routing(routings: Sequence[TokenRouting]) -> dict[str, Any] | None:
    if not routings:
        return None
    layers = max(len(routing.experts) for routing in routings)
    width = max((len(row) for routing in routings for row in routing.experts), default=0)
    experts = np.full((len(routings), layers, width), -1, "<i4")
    weights = np.zeros((len(routings), layers, width), "<f4")
    for t, routing in enumerate(routings):
        for layer, (chosen, given) in enumerate(zip(routing.experts, routing.weights, strict=True)):
            experts[t, layer, : len(chosen)] = chosen
            weights[t, layer, : len(given)] = given
    return {
        "routed_experts": base64.b64encode(experts.tobytes()).decode("ascii"),
        "routed_weights": base64.b64encode(weights.tobytes()).decode("ascii"),
        "routed_shape": list(experts.shape),
    }
