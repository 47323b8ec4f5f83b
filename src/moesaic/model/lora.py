"""Low-rank adapters (LoRA, arXiv 2106.09685) on a finished model, from outside: W becomes W + alpha / rank x B A.

A weight with an adapter is summed where it is read, so every backend, fused kernels among them, and everything else
that reads weights serves it unchanged; gradients reach A and B through that of the sum. The other way, thin products of
rows beside the thick ones, would need no sum and no gradient of it, and kernels that leave room for them between an
expert's two products. Per expert a sum costs 3 r D F multiply-adds whatever its number of rows, the thin products
r (2 D + 3 F) for each row. Until the backward pass the sums take the memory of the adapted weights once more; with
`activation_checkpointing` those of one block.

E experts, M x N one matrix, r rank, D hidden size, F expert intermediate size.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from moesaic.config import LoRAConfig
from moesaic.errors import MoesaicError, UsageError
from moesaic.model.experts import MATRICES, Experts
from moesaic.model.mlp import MLP
from moesaic.model.quantize import is_quantized
from moesaic.model.routers.base import LinearRouter
from moesaic.model.transformer import Transformer

TARGETS = ("experts", "shared_experts", "mlp", "attention", "lm_head", "router")
"""What can be named; which of them a model has, `places` tells."""


class Adapter(nn.Module):
    """weight (..., M, N) -> weight + scale x B A, with A (..., r, N) and B (..., M, r), for each expert its own.

    A is random and B is 0, so at first nothing is added. The sum is computed in float32 and rounded once to the type of
    the weight, under autocast too.
    """

    def __init__(self, weight: Tensor, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        *stack, rows, columns = weight.shape
        self.scale = scale
        first = torch.empty(*stack, rank, columns).normal_(0.0, columns**-0.5, generator=generator)
        self.A = nn.Parameter(first.to(weight.device))
        self.B = nn.Parameter(torch.zeros(*stack, rows, rank, device=weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        add = torch.baddbmm if weight.ndim == 3 else torch.addmm
        with torch.autocast(weight.device.type, enabled=False):
            return add(weight.float(), self.B, self.A, alpha=self.scale).to(weight.dtype)


def places(model: Transformer) -> dict[str, list[tuple[str, nn.Module, str]]]:
    """By target (name of a module, module, name of its weight): all that an adapter of this model can reach."""
    found: dict[str, list[tuple[str, nn.Module, str]]] = {}
    for target, name, module, leaf in _places(model):
        found.setdefault(target, []).append((name, module, leaf))
    return {target: found[target] for target in TARGETS if target in found}


def chosen_places(model: Transformer, lora: LoRAConfig) -> list[tuple[str, nn.Module, str]]:
    """Those of `lora.targets`; the model may be on the meta device.

    Raises UsageError for packed weights, for a target that is not known or that this model does not have, with those
    that it has, and for a rank above the size of a matrix.
    """
    if is_quantized(model):
        raise UsageError("the model is quantised, and adapters need plain weights; name the one that it was made from")
    reached = places(model)
    for target in lora.targets:
        if target not in reached:
            why = "is not in this model" if target in TARGETS else "is not known"
            tied = ": its head is the embedding (tie_word_embeddings)" if target == "lm_head" else ""
            raise UsageError(f"lora.targets has {target!r}, which {why}{tied}; choose of {', '.join(reached)}")
    chosen = [place for target in lora.targets for place in reached[target]]
    for name, module, leaf in chosen:
        rows, columns = getattr(module, leaf).shape[-2:]
        if lora.rank > min(rows, columns):
            raise UsageError(
                f"lora.rank is {lora.rank}, but {name}.{leaf} is {rows} x {columns}; set at most {min(rows, columns)}"
            )
    return chosen


def add_adapters(model: Transformer, lora: LoRAConfig, seed: int = 0) -> None:
    """Freezes all of the model and gives `lora.targets` adapters, which alone are then trained. The same for the same
    seed. Raises UsageError as `chosen_places` does.
    """
    chosen = chosen_places(model, lora)
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for _, module, leaf in chosen:
        adapter = Adapter(getattr(module, leaf), lora.rank, lora.alpha / lora.rank, generator)
        parametrize.register_parametrization(module, leaf, adapter)


@torch.no_grad()
def merge_adapters(model: Transformer) -> None:
    """Adds every adapter to its weight, in the weight's type, and takes it away; the model is then as any other."""
    for module in model.modules():
        if parametrize.is_parametrized(module):
            for leaf in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, leaf)  # type: ignore[arg-type]
    model.requires_grad_(True)


def has_adapters(model: nn.Module) -> bool:
    return any(isinstance(module, Adapter) for module in model.modules())


def adapted_state(model: nn.Module) -> dict[str, Tensor]:
    """What sets a model with adapters apart from the one that it was made of: these, and buffers such as selection
    biases. Of a model without adapters, all of its state."""
    state = model.state_dict()
    if not has_adapters(model):
        return state
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    return {name: value for name, value in state.items() if name not in frozen}


def load_adapted_state(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """The way back. Raises MoesaicError for tensors that are not exactly those of `adapted_state`."""
    if not has_adapters(model):
        model.load_state_dict(tensors)
        return
    expected = adapted_state(model)
    wrong = expected.keys() ^ tensors.keys()
    wrong |= {name for name in expected.keys() & tensors.keys() if expected[name].shape != tensors[name].shape}
    if wrong:
        raise MoesaicError(f"the saved adapters are not those of this model: {min(wrong)} does not fit")
    model.load_state_dict(tensors, strict=False)


def _places(model: Transformer) -> Iterator[tuple[str, str, nn.Module, str]]:
    """(target, name of a module, module, name of its weight)."""
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if isinstance(module, Experts):
            yield from (("experts", name, module, matrix) for matrix in MATRICES)
        elif isinstance(module, LinearRouter):
            yield "router", name, module, "weight"
        elif isinstance(module, MLP):
            target = "shared_experts" if leaf == "shared_experts" else "mlp"
            yield from ((target, *place) for place in _linears(name, module))
        elif leaf == "attention":
            yield from (("attention", *place) for place in _linears(name, module))
    if not model.config.tie_word_embeddings:
        yield "lm_head", "lm_head", model.lm_head, "weight"


def _linears(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    for child_name, child in module.named_children():
        if isinstance(child, nn.Linear):
            yield f"{name}.{child_name}", child, "weight"
