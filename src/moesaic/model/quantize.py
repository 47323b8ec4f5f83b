"""A finished model with packed weights, made from outside: which weights, and in what format.

Packed are, by kind: the routed experts, shared experts, the dense feed-forwards, attention's projections, and the head,
which becomes a copy of its own where it is tied to the embedding. Routers, norms, biases, embeddings and free experts
stay as they are, and so does latent attention's kv_b_proj, which decoding multiplies from both sides.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from moesaic.config import ModelConfig
from moesaic.errors import MoesaicError, UsageError
from moesaic.model.experts import Experts
from moesaic.model.mlp import MLP
from moesaic.model.packed_linear import PackedLinear
from moesaic.model.transformer import Transformer
from moesaic.ops.quantize import DEFAULT_GROUP_SIZE, PackedWeight, require_format

KINDS = ("experts", "shared_experts", "mlp", "attention", "lm_head")
SCHEMES = {
    "int8": dict.fromkeys(KINDS, "int8"),
    "int4": {"experts": "int4", "shared_experts": "int8", "mlp": "int8", "attention": "int8", "lm_head": "int4"},
    "mxfp4": {"experts": "mxfp4"},
}
"""Format of each kind of weight; kinds that are not named stay plain.

int4 keeps in int8 what every token needs and what is small: in OLMoE-1B-7B, 4 % of the weights. The head is as large
again, and is read for every token. mxfp4 is for models whose experts were published so, and exact for them.
"""
NOT_PACKED = ("kv_b_proj",)


@dataclass(frozen=True)
class Quantization:
    """Formats by kind, and the size of groups. `scheme` is a name in SCHEMES, for those who read it.

    Raises UsageError for what is not known.
    """

    scheme: str
    group_size: int
    formats: Mapping[str, str]

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise UsageError(f"quantization {self.scheme!r} is not known; choose {', '.join(SCHEMES)}")
        for kind, format in self.formats.items():
            if kind not in KINDS:
                raise UsageError(f"weights of kind {kind!r} are not known; choose {', '.join(KINDS)}")
            require_format(format, self.group_size)


def make_quantization(scheme: str, config: ModelConfig, group_size: int = DEFAULT_GROUP_SIZE) -> Quantization:
    """`scheme` for such a model: in one without experts the feed-forwards take the experts' format.

    Raises UsageError when the scheme is unknown, has no such groups, or would pack nothing of the model.
    """
    if scheme not in SCHEMES:
        raise UsageError(f"quantization {scheme!r} is not known; choose {', '.join(SCHEMES)}")
    formats = SCHEMES[scheme]
    if config.moe is None:
        if scheme == "mxfp4":
            raise UsageError("quantization mxfp4 packs experts, and this model has none; choose int8 or int4")
        formats = {kind: format for kind, format in formats.items() if "experts" not in kind}
        formats["mlp"] = SCHEMES[scheme]["experts"]
    return Quantization(scheme, group_size, formats)


@torch.no_grad()
def quantize_model(model: Transformer, quantization: Quantization) -> None:
    """Packs the model's weights in place, one after the other; it is then for inference, without gradients.

    Raises UsageError when the model is packed already, MoesaicError for weights that are not finite, by name.
    """
    if is_quantized(model):
        raise UsageError("the model is quantised already; load it without quantization")
    model.requires_grad_(False)
    for kind, name, module in list(_parts(model)):
        format = quantization.formats.get(kind)
        if format is None:
            continue
        try:
            if isinstance(module, Experts):
                module.quantize(format, quantization.group_size)
                continue
            assert not isinstance(module, PackedLinear)
            weight, bias = (model.embed_tokens.weight, None) if module is None else (module.weight, module.bias)
            _replace(model, name, PackedLinear.of(weight, bias, format, quantization.group_size))
        except MoesaicError as error:
            raise type(error)(f"{name}: {error}") from error


def is_quantized(model: nn.Module) -> bool:
    moved_out = any(isinstance(module, Experts) and module.store is not None for module in model.modules())
    return moved_out or any(True for _ in packed_weights(model))


def packed_weights(model: nn.Module) -> Iterator[tuple[str, str, PackedWeight]]:
    """(kind, name in the model's state, packed weight)."""
    for kind, name, module in _parts(model):
        if isinstance(module, Experts):
            for leaf, packed in module.packed.items():
                yield kind, f"{name}.{leaf}", packed
        elif isinstance(module, PackedLinear):
            yield kind, f"{name}.weight", module.packed


def _parts(model: nn.Module) -> Iterator[tuple[str, str, Experts | nn.Linear | PackedLinear | None]]:
    """(kind, name, module) of what can be packed; None for a head that is tied to the embedding."""
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if isinstance(module, Experts):
            yield "experts", name, module
        elif isinstance(module, MLP):
            kind = "shared_experts" if leaf == "shared_experts" else "mlp"
            yield from ((kind, f"{name}.{child}", linear) for child, linear in _linears(module))
        elif leaf == "attention":
            yield from (("attention", f"{name}.{child}", linear) for child, linear in _linears(module))
    head = getattr(model, "lm_head", None)
    yield "lm_head", "lm_head", head


def _linears(module: nn.Module) -> Iterator[tuple[str, nn.Linear | PackedLinear]]:
    for name, child in module.named_children():
        if isinstance(child, nn.Linear | PackedLinear) and name not in NOT_PACKED:
            yield name, child


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
