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
from moesaic.model.quantize import SCHEMES, Quantization, packed_weights
from moesaic.model.transformer import Transformer
from moesaic.ops.quantize import pack

METHOD = "moesaic"
VERSION = 1
"""Of the layout of packed weights."""


def quantization_to_config(quantization: Quantization) -> dict[str, Any]:
    return {
        "quant_method": METHOD,
        "version": VERSION,
        "scheme": quantization.scheme,
        "group_size": quantization.group_size,
        "formats": dict(quantization.formats),
    }


def quantization_from_config(values: Any) -> Quantization | None:
    """Of `quantization_config`; None when it is absent or of another method.

    Raises MoesaicError, naming the key, for what we cannot read.
    """
    if not isinstance(values, Mapping) or values.get("quant_method") != METHOD:
        return None
    unknown = values.keys() - {"quant_method", "version", "scheme", "group_size", "formats"}
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
        quantization = Quantization(scheme, group_size, formats)
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


def packed_layout(layout: Layout, config: ModelConfig, quantization: Quantization) -> Layout:
    """The layout of a quantised directory: our tensors under our names."""
    names = [region.ours for alternatives in layout.tensors for one in alternatives[0] for region in one.regions]
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
        self._read, self._joined = read, joined
        self._tied = model.config.tie_word_embeddings
        self._in_memory: Mapping[str, Tensor] = {}

    def plain(self, name: str) -> Tensor:
        """The tensor as it is stored."""
        name = "embed_tokens.weight" if self._tied and name == "lm_head.weight" else name
        if name in self._in_memory:
            return self._in_memory[name]
        together = self._joined(name)
        self._in_memory = {}  # let go before the next is read
        tensors = self._read(together)
        self._in_memory = tensors if len(together) > 1 else {}
        return tensors[name]

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
