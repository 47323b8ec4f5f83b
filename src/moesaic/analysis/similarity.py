"""Which experts of a layer are alike, in their weights and in what they compute.

S sampled tokens, E experts, P numbers of an expert that are compared, D hidden size.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.model.experts import Experts
from moesaic.model.transformer import Transformer
from moesaic.ops import ExpertWeights, Routing
from moesaic.residency.residency import LayerStore, residency_of

MOST_NUMBERS = 2**25
"""Of all experts of a layer that are in memory at once, 128 MiB; a sixteenth of it where memory has a budget."""
SAMPLED_TOKENS = 64
ALIKE = 0.99
"""A cosine from which two experts are called duplicates."""


@dataclass(frozen=True)
class Similarity:
    """Cosines between the experts of one layer, each (E, E) float32; 0 for an expert that is all zero."""

    weights: Tensor
    """Of all an expert's matrices, written one after another. Hidden units in another order compute the same and are
    not recognised here: that would be a matching problem for each pair. The outputs tell."""
    compared: int
    """Numbers of each expert: all, or an even sample where they are too many for memory."""
    numbers: int
    outputs: Tensor
    """Of what the experts make of the same tokens, which the layer got, weights of the router left out."""

    def duplicates(self) -> list[tuple[int, int]]:
        """Pairs with a cosine of ALIKE at least in weights or outputs."""
        alike_EE = (self.weights >= ALIKE) | (self.outputs >= ALIKE)
        return [(int(i), int(j)) for i, j in alike_EE.triu(1).nonzero().tolist()]


@torch.no_grad()
def similarity(model: Transformer, layer: int, inputs: Tensor) -> Similarity:
    """Of MoE layer `layer`; inputs (S, D) are tokens that its experts got. Experts are read one by one.

    Raises MoesaicError where an expert on disk cannot be read.
    """
    experts = model.moe_layers[layer].experts
    residency = residency_of(model)
    most = MOST_NUMBERS if residency is None else MOST_NUMBERS // 16
    num_experts, numbers = experts.num_experts, 3 * experts.hidden_size * experts.intermediate_size
    step = max(1, -(-numbers * num_experts // most))
    sampled_EP = torch.empty(num_experts, len(range(0, numbers, step)))
    for expert, matrices in _matrices(experts):
        sampled_EP[expert] = torch.cat([matrix.reshape(-1) for matrix in matrices])[::step]
    weights_EE = _cosines(sampled_EP)
    compared = sampled_EP.shape[1]
    del sampled_EP
    with nullcontext() if residency is None else residency.room(pass_tokens=len(inputs)):
        outputs_EE = _cosines(torch.stack([_output(experts, expert, inputs) for expert in range(num_experts)]))
    return Similarity(weights_EE, compared, numbers, outputs_EE)


class InputSample:
    """`with InputSample(model) as sample: model(tokens)` keeps an even sample of what each layer's experts get."""

    def __init__(self, model: Transformer, number: int = SAMPLED_TOKENS) -> None:
        self._experts = [layer.experts for layer in model.moe_layers]
        self._number = number
        self._kept: list[list[Tensor]] = [[] for _ in self._experts]
        self._passes = 0

    def __enter__(self) -> "InputSample":
        self._handles = [
            experts.register_forward_pre_hook(self._keeper(kept))
            for experts, kept in zip(self._experts, self._kept, strict=True)
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def of_layer(self, layer: int) -> Tensor:
        """(S, D), evenly over all passes; S may be fewer than asked for."""
        rows = torch.cat(self._kept[layer])
        return rows[torch.linspace(0, len(rows) - 1, min(self._number, len(rows))).long()]

    def _keeper(self, kept: list[Tensor]):
        def keep(module: object, args: Sequence[Tensor]) -> None:
            x_TD = args[0].detach()
            kept.append(x_TD[:: max(1, len(x_TD) // 8)][:8].clone())
            if len(kept) > 4 * self._number:
                kept[:] = kept[::2]

        return keep


def _matrices(experts: Experts) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    """Each expert's number, and its matrices as float32, from wherever they are."""
    if not isinstance(experts.store, LayerStore):
        for weights in experts.stacks(torch.float32 if experts.packed else experts.gate_up.dtype):
            yield from _of_chunk(weights)
        return
    with closing(experts.store.residency.cache.chunks(experts.store.layer, range(experts.num_experts))) as chunks:
        for weights in chunks:
            yield from _of_chunk(weights)


def _of_chunk(weights: ExpertWeights) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
    slots_E = weights.slots
    for number in range(weights.num_experts) if slots_E is None else (slots_E >= 0).nonzero().flatten().tolist():
        gate_up, down = weights.matrices_of(number, torch.float32)
        yield number, (gate_up.detach().float().cpu(), down.detach().float().cpu())


def _output(experts: Experts, expert: int, inputs: Tensor) -> Tensor:
    """(S x D,) float32: what one expert makes of all inputs."""
    num_tokens, num_experts = len(inputs), experts.num_experts
    device = inputs.device
    routing = Routing(
        token_ids=torch.arange(num_tokens, device=device),
        expert_ids=torch.full((num_tokens,), expert, device=device),
        weights=torch.ones(num_tokens, device=device),
        logits=torch.zeros(num_tokens, num_experts, device=device),
        num_experts=num_experts,
        top_k=1,
    )
    return experts(inputs, routing).float().cpu().reshape(-1)


def _cosines(rows: Tensor) -> Tensor:
    """(E, P) -> (E, E)."""
    unit_EP = rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp_min(1e-30)
    return (unit_EP @ unit_EP.T).clamp(-1, 1)
