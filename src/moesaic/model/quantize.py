"""A finished model with packed weights, made from outside: which weights, and in what format.

Packed are, by kind: the routed experts, shared experts, the dense feed-forwards, attention's projections, and the head,
which becomes a copy of its own where it is tied to the embedding. Routers, norms, biases, embeddings and free experts
stay as they are, and so does latent attention's kv_b_proj, which decoding multiplies from both sides.

Some of the routed experts, the hot ones, may have a kind of their own, in 8 bits beside 4.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from moesaic.config import ModelConfig
from moesaic.errors import MoesaicError, UsageError
from moesaic.model.experts import HOT, Experts
from moesaic.model.mixed_precision import COLD_FORMAT, HOT_FORMAT, HotExperts, require_experts
from moesaic.model.mlp import MLP
from moesaic.model.packed_linear import PackedLinear
from moesaic.model.transformer import Transformer
from moesaic.ops.quantize import DEFAULT_GROUP_SIZE, PackedWeight, require_format

HOT_KIND = "hot_experts"
KINDS = ("experts", HOT_KIND, "shared_experts", "mlp", "attention", "lm_head")
SCHEMES = {
    "int8": {kind: "int8" for kind in KINDS if kind != HOT_KIND},
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

    `hot` says which experts are of the kind hot_experts; there are such a kind and such experts, or neither.
    Raises UsageError for what is not known.
    """

    scheme: str
    group_size: int
    formats: Mapping[str, str]
    hot: HotExperts = ()

    def __post_init__(self) -> None:
        require_scheme(self.scheme)
        for kind, format in self.formats.items():
            if kind not in KINDS:
                raise UsageError(f"weights of kind {kind!r} are not known; choose {', '.join(KINDS)}")
            require_format(format, self.group_size)
        if any(self.hot) != (HOT_KIND in self.formats):
            raise UsageError(
                f"there are {sum(map(len, self.hot))} hot experts, and {'a' if HOT_KIND in self.formats else 'no'} "
                "format for them; give both or neither"
            )
        if self.hot and (self.formats.get("experts"), self.formats[HOT_KIND]) != (COLD_FORMAT, HOT_FORMAT):
            raise UsageError(f"hot experts are {HOT_FORMAT} beside others of {COLD_FORMAT}; choose {COLD_FORMAT}")


def make_quantization(
    scheme: str, config: ModelConfig, group_size: int = DEFAULT_GROUP_SIZE, hot: Sequence[Sequence[int]] = ()
) -> Quantization:
    """`scheme` for such a model: in one without experts the feed-forwards take the experts' format.

    With int4, `hot` names experts that get int8 in its place, a list for each layer that has experts.

    Raises UsageError when the scheme is unknown, has no such groups, or would pack nothing of the model, and for hot
    experts that the model does not have.
    """
    require_scheme(scheme)
    formats = SCHEMES[scheme]
    if any(hot):
        require_hot_scheme(scheme)
        require_experts(hot, config)
        formats = formats | {HOT_KIND: HOT_FORMAT}
        return Quantization(scheme, group_size, formats, tuple(map(tuple, hot)))
    if config.moe is None:
        if scheme == "mxfp4":
            raise UsageError("quantization mxfp4 packs experts, and this model has none; choose int8 or int4")
        formats = {kind: format for kind, format in formats.items() if "experts" not in kind}
        formats["mlp"] = SCHEMES[scheme]["experts"]
    return Quantization(scheme, group_size, formats)


def require_scheme(scheme: str) -> None:
    if scheme not in SCHEMES:
        raise UsageError(f"quantization {scheme!r} is not known; choose {', '.join(SCHEMES)}")


def require_hot_scheme(scheme: str) -> None:
    """Raises UsageError for a scheme in which no experts stand out by having 8 bits."""
    if SCHEMES[scheme]["experts"] != COLD_FORMAT:
        raise UsageError(
            f"hot experts are {HOT_FORMAT} beside others of {COLD_FORMAT}, and scheme {scheme} has none of these; "
            f"choose scheme {COLD_FORMAT}"
        )


@torch.no_grad()
def quantize_model(model: Transformer, quantization: Quantization) -> None:
    """Packs the model's weights in place, one after the other; it is then for inference, without gradients.

    Raises UsageError when the model is packed already or has no such hot experts, MoesaicError for weights that are not
    finite, by name.
    """
    if is_quantized(model):
        raise UsageError("the model is quantised already; load it without quantization")
    if quantization.hot:
        require_experts(quantization.hot, model.config)
    model.requires_grad_(False)
    hot = iter(quantization.hot)
    for kind, name, module in list(_parts(model)):
        format = quantization.formats.get(kind)
        if format is None:
            continue
        try:
            if isinstance(module, Experts):
                module.quantize(format, quantization.group_size, next(hot, ()), HOT_FORMAT)
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
                yield HOT_KIND if module.is_hot(leaf) else kind, f"{name}.{leaf}", packed
        elif isinstance(module, PackedLinear):
            yield kind, f"{name}.weight", module.packed


def split_stacks(model: nn.Module) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(name in the model's state, name of the whole stack in a plain model's, experts of it) of packed stacks that hold
    some of a layer's experts."""
    for name, module in model.named_modules():
        if isinstance(module, Experts):
            for leaf in module.packed:
                if len(module.members(leaf)) < module.num_experts:
                    yield f"{name}.{leaf}", f"{name}.{leaf.removeprefix(HOT)}", module.members(leaf)


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
