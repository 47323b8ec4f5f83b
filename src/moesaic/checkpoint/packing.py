"""Packed weights on their way: what config.json says of them, and packing a model while it is read.

A quantised directory holds a model's tensors under our names, in the form that they have in memory: packed ones as
uint8 (see moesaic.ops.quantize), the others plain. Its config.json is that of the family, with a `quantization_config`
of quant_method "moesaic".
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from moesaic.checkpoint.families.hf_config import shortened
from moesaic.checkpoint.families.layout import Layout, same
from moesaic.config import ModelConfig
from moesaic.errors import MoesaicError, UsageError
from moesaic.model.experts import HOT, MATRICES
from moesaic.model.mixed_precision import HotExperts, require_experts
from moesaic.model.quantize import SCHEMES, Quantization, packed_weights, split_stacks
from moesaic.model.transformer import Transformer
from moesaic.ops.quantize import pack

METHOD = "moesaic"
VERSION = 1
"""Of the layout of packed weights."""
HOT_KEY = "hot_experts"
"""By layer with experts, those that are packed as int8 beside others as int4; absent where there are none."""


def quantization_to_config(quantization: Quantization) -> dict[str, Any]:
    values = {
        "quant_method": METHOD,
        "version": VERSION,
        "scheme": quantization.scheme,
        "group_size": quantization.group_size,
        "formats": dict(quantization.formats),
    }
    return values | {HOT_KEY: [list(numbers) for numbers in quantization.hot]} if quantization.hot else values


def quantization_from_config(values: Any) -> Quantization | None:
    """Of `quantization_config`; None when it is absent or of another method.

    Raises MoesaicError, naming the key, for what we cannot read.
    """
    if not isinstance(values, Mapping) or values.get("quant_method") != METHOD:
        return None
    unknown = values.keys() - {"quant_method", "version", "scheme", "group_size", "formats", HOT_KEY}
    if unknown:
        raise MoesaicError(f"config.json: quantization_config has the unknown key {shortened(min(unknown))}")
    version, scheme, group_size, formats = map(values.get, ("version", "scheme", "group_size", "formats"))
    if type(version) is not int or version != VERSION:
        raise MoesaicError(
            f"config.json: quantization_config has version {shortened(version)}, and this moesaic reads {VERSION}; "
            "quantise the model again"
        )
    if not isinstance(scheme, str) or type(group_size) is not int:
        raise MoesaicError(
            f"config.json: quantization_config has scheme = {shortened(scheme)} and group_size = "
            f"{shortened(group_size)}; they are a name and a whole number"
        )
    if not isinstance(formats, dict) or not formats or not all(isinstance(one, str) for one in formats.values()):
        raise MoesaicError(
            f"config.json: quantization_config has formats = {shortened(formats)}; it gives kinds of weights a format"
        )
    for name in (scheme, *formats, *formats.values()):
        if len(name) > 40:
            raise MoesaicError(f"config.json: quantization_config names {shortened(name)}, which nobody knows")
    try:
        quantization = Quantization(scheme, group_size, formats, _hot_experts(values.get(HOT_KEY, [])))
    except UsageError as error:  # what a user may not ask for; here it came from a file
        raise MoesaicError(f"config.json: quantization_config: {error}") from error
    # Formats of as many bits have the same shapes: int4 read as mxfp4 would load, and be other numbers.
    used, possible = set(formats.values()), set(SCHEMES[scheme].values())
    if scheme not in used or not used <= possible:
        raise MoesaicError(
            f"config.json: quantization_config has the formats {', '.join(sorted(used))}, which are not those of "
            f"scheme {scheme}; quantise the model again"
        )
    return quantization


def _hot_experts(values: Any) -> HotExperts:
    is_of_numbers = isinstance(values, list) and all(
        isinstance(layer, list) and all(type(number) is int for number in layer) for layer in values
    )
    if not is_of_numbers:
        raise MoesaicError(
            f"config.json: quantization_config has {HOT_KEY} = {shortened(values)}; it is a list of numbers of experts "
            "for each layer"
        )
    return tuple(map(tuple, values))


def packed_layout(layout: Layout, config: ModelConfig, quantization: Quantization) -> Layout:
    """The layout of a quantised directory: our tensors under our names.

    Raises MoesaicError where its hot experts are not the model's.
    """
    names = [region.ours for alternatives in layout.tensors for one in alternatives[0] for region in one.regions]
    if quantization.hot:
        try:
            require_experts(quantization.hot, config)
        except UsageError as error:
            raise MoesaicError(f"config.json: quantization_config: {error}") from error
        assert config.moe is not None
        layers = [index for index in range(config.num_hidden_layers) if config.is_moe_layer(index)]
        names += [
            f"layers.{index}.feed_forward.experts.{HOT}{leaf}"
            for index, numbers in zip(layers, quantization.hot, strict=True)
            for leaf in MATRICES
            if 0 < len(numbers) < config.moe.num_experts
        ]
    if config.tie_word_embeddings and "lm_head" in quantization.formats:
        names.append("lm_head.weight")
    return Layout(tuple(same(name, name) for name in dict.fromkeys(names)))


class PackingReader:
    """The tensors of a model that was quantised on the meta device, each made when it is asked for.

    `read` gives plain tensors by name; `joined` says which must be read together, because they lie in one on disk.
    """

    def __init__(
        self,
        model: Transformer,
        read: Callable[[Sequence[str]], Mapping[str, Tensor]],
        joined: Callable[[str], Sequence[str]],
    ) -> None:
        self.packed = {name: (kind, weight) for kind, name, weight in packed_weights(model)}
        self._split = {name: (whole, experts) for name, whole, experts in split_stacks(model)}
        self._read, self._joined = read, joined
        self._tied = model.config.tie_word_embeddings
        self._in_memory: Mapping[str, Tensor] = {}

    def plain(self, name: str) -> Tensor:
        """The tensor as it is stored, or those experts of it."""
        whole, experts = self._split.get(name, (name, None))
        whole = "embed_tokens.weight" if self._tied and whole == "lm_head.weight" else whole
        if whole not in self._in_memory:
            together = self._joined(whole)
            self._in_memory = {}  # let go before the next is read
            tensors = self._read(together)
            if len(together) == 1 and experts is None:
                return tensors[whole]
            self._in_memory = tensors
        weight = self._in_memory[whole]
        return weight if experts is None else weight[list(experts)]

    def tensor(self, name: str) -> Tensor:
        """The tensor as the quantised model has it. Raises MoesaicError for weights that are not finite, by name."""
        weight = self.plain(name)
        return self.pack(name, weight) if name in self.packed else weight

    def pack(self, name: str, weight: Tensor) -> Tensor:
        _, like = self.packed[name]
        try:
            return pack(weight, like.format, like.group_size).data
        except MoesaicError as error:
            raise MoesaicError(f"{name}: {error}") from error
