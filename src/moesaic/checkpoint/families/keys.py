"""The keys of config.json and the fields of ModelConfig, as parts that translate in both directions.

A family lists its parts. `read` takes keys of theirs and gives fields of ours, `write` the other way; fields of the
nested configs are named `moe.num_experts` and `mla.kv_lora_rank`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from moesaic.checkpoint.families.hf_config import LIKE_ABSENT, REQUIRED, HFConfig, shortened
from moesaic.config import ModelConfig
from moesaic.errors import MoesaicError

Fields = dict[str, Any]

MAX_LAYERS = 10_000
"""Of a hostile config.json there is nothing larger to fear than a list with one entry per layer."""


class KeyPart(Protocol):
    def read(self, hf: HFConfig, fields: Fields) -> Fields:
        """Fields of ours; `fields` holds what the parts before this one have read."""
        ...

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Keys of theirs."""
        ...


def field_of(config: object, path: str) -> Any:
    """`moe.num_experts` of a config; None where a nested config is absent."""
    for name in path.split("."):
        config = getattr(config, name, None)
    return config


@dataclass(frozen=True)
class Key:
    """One key of theirs is one field of ours."""

    theirs: str
    ours: str
    kind: type
    default: Any = REQUIRED
    """When the key is absent; a family's own default as transformers has it."""
    null: Any = LIKE_ABSENT
    """When it is null, if that means something else."""
    also_called: tuple[str, ...] = ()
    """Other names, for reading."""
    most: int | None = None

    def read(self, hf: HFConfig, fields: Fields) -> Fields:
        present = [name for name in (self.theirs, *self.also_called) if name in hf]
        hf.ignore(*self.also_called)
        name = present[0] if present else self.theirs
        value = hf.take(name, self.kind, self.default, self.null)
        if self.most is not None and value > self.most:
            raise MoesaicError(f"config.json: {name} is {value:,}; no model has more than {self.most:,}")
        return {self.ours: value}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {self.theirs: field_of(config, self.ours)}


@dataclass(frozen=True)
class SharedBias:
    """One flag of theirs is several of ours, which must agree."""

    theirs: str
    ours: tuple[str, ...]
    default: bool = False

    def read(self, hf: HFConfig, fields: Fields) -> Fields:
        return dict.fromkeys(self.ours, hf.take(self.theirs, bool, self.default))

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {self.theirs: any(field_of(config, name) for name in self.ours)}


@dataclass(frozen=True)
class Flag:
    """A flag of theirs is a choice of ours, or the other way round."""

    theirs: str
    ours: str
    meaning: Mapping[Any, Any]
    """Their value -> ours."""
    default: Any

    def read(self, hf: HFConfig, fields: Fields) -> Fields:
        value = hf.take(self.theirs, type(self.default), self.default)
        if value not in self.meaning:
            raise hf.unsupported(self.theirs, " or ".join(repr(choice) for choice in self.meaning))
        return {self.ours: self.meaning[value]}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        theirs = [value for value, meaning in self.meaning.items() if meaning == field_of(config, self.ours)]
        return {self.theirs: theirs[0] if theirs else self.default}


@dataclass(frozen=True)
class Always:
    """Fields of ours that the family fixes."""

    fields: Mapping[str, Any]

    def read(self, hf: HFConfig, fields: Fields) -> Fields:
        return dict(self.fields)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {}


@dataclass(frozen=True)
class Only:
    """A key of theirs of which we do one value; it is written, and others are refused by name."""

    theirs: str
    value: Any
    or_also: tuple[Any, ...] = ()

    def read(self, hf: HFConfig, fields: Fields) -> Fields:
        hf.only(self.theirs, self.value, *self.or_also)
        return {}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {self.theirs: self.value}


@dataclass(frozen=True)
class NoEffect:
    """Keys of theirs that do not change what this model computes."""

    keys: tuple[str, ...]
    because: str
    written: Mapping[str, Any] = field(default_factory=dict)
    """Those that other programs want to see."""

    def read(self, hf: HFConfig, fields: Fields) -> Fields:
        hf.ignore(*self.keys)
        return {}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return dict(self.written)


@dataclass(frozen=True)
class GroupsOfTwo:
    """Sigmoid routers of transformers score a group by its two best experts, even when there is one group only."""

    def read(self, hf: HFConfig, fields: Fields) -> Fields:
        return {}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        assert config.moe is not None
        if config.moe.num_experts // config.moe.n_group < 2:
            raise MoesaicError("it needs at least 2 experts in a group; train the model with more experts")
        return {}


@dataclass(frozen=True)
class HeadSizes:
    """Heads and their width. Without num_key_value_heads every query head has its own, without head_dim the heads
    share out hidden_size, unless the family has a width of its own."""

    default_head_dim: int | None = None
    default_key_value_heads: int | None = None
    fixed_head_dim: bool = False
    """The family has no head_dim key; where a file has one, it must say the same."""

    def read(self, hf: HFConfig, fields: Fields) -> Fields:
        heads = hf.take("num_attention_heads", int)
        hidden_size = hf.take("hidden_size", int)
        if heads < 1:
            raise MoesaicError(f"config.json: num_attention_heads is {heads}; it must be above 0")
        shared_out = self.default_head_dim or hidden_size // heads
        if self.fixed_head_dim:
            hf.only("head_dim", shared_out)
        return {
            "hidden_size": hidden_size,
            "num_attention_heads": heads,
            "num_key_value_heads": hf.take("num_key_value_heads", int, self.default_key_value_heads or heads, heads),
            "head_dim": shared_out if self.fixed_head_dim else hf.take("head_dim", int, shared_out),
        }

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {
            "hidden_size": config.hidden_size,
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            **({} if self.fixed_head_dim else {"head_dim": config.head_dim}),
        }


@dataclass(frozen=True)
class SpecialTokens:
    default_bos: int | None = None
    default_eos: int | None = None

    def read(self, hf: HFConfig, fields: Fields) -> Fields:
        hf.ignore("eos_token_id")
        eos = hf.values["eos_token_id"] if "eos_token_id" in hf else self.default_eos
        return {
            "bos_token_id": hf.take("bos_token_id", int, self.default_bos, None),
            "eos_token_ids": token_ids(eos),
        }

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """With a null for padding: some families default to a token that a small vocabulary does not have."""
        eos = eos_as_hf(config.eos_token_ids)
        return {"bos_token_id": config.bos_token_id, "eos_token_id": eos, "pad_token_id": None}


def token_ids(value: Any) -> tuple[int, ...]:
    """eos_token_id as Hugging Face writes it: null, one id, or a list."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token_id) is int for token_id in ids):
        raise MoesaicError(f"eos_token_id is {shortened(value)}; it must be an integer or a list of integers")
    return tuple(ids)


def eos_as_hf(ids: tuple[int, ...]) -> int | list[int] | None:
    return list(ids) if len(ids) > 1 else ids[0] if ids else None


@dataclass(frozen=True)
class InitializerRange:
    """Ours may be 0, which fits it to each matrix; theirs is a number that only training from scratch uses."""

    def read(self, hf: HFConfig, fields: Fields) -> Fields:
        return {"initializer_range": hf.take("initializer_range", float, 0.02)}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {"initializer_range": config.initializer_range or config.hidden_size**-0.5}


@dataclass(frozen=True)
class WindowEverywhere:
    """`sliding_window` holds for all layers, or is null (Mistral, Mixtral)."""

    default: int | None = None
    switch: str = ""
    """A key that must be true for the window to count (Qwen3-MoE)."""

    def read(self, hf: HFConfig, fields: Fields) -> Fields:
        window = hf.take("sliding_window", int, self.default, None)
        if self.switch and not hf.take(self.switch, bool, False):
            window = None
        layers = fields["num_hidden_layers"]
        return window_fields(["sliding_attention" if window else "full_attention"] * layers, window)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        slides = "sliding_attention" in config.layer_types
        switch = {self.switch: slides} if self.switch else {}
        return {"sliding_window": config.sliding_window if slides else None, **switch}


def window_fields(layer_types: Sequence[str], window: int | None) -> Fields:
    """Layer types and the window in one spelling: where no layer slides, both are empty."""
    if "sliding_attention" not in layer_types:
        window = None
    if all(layer_type == "full_attention" for layer_type in layer_types):
        layer_types = ()
    return {"layer_types": tuple(layer_types), "sliding_window": window}


def dense_layer_fields(dense: Sequence[int]) -> Fields:
    """Which layers are dense, in one spelling: the leading ones by number, the rest by name."""
    leading = 0
    while leading in dense:
        leading += 1
    rest = sorted({index for index in dense if index >= leading})
    return {"moe.first_k_dense_replace": leading, "moe.mlp_only_layers": tuple(rest)}


def dense_layers(config: ModelConfig) -> list[int]:
    return [index for index in range(config.num_hidden_layers) if not config.is_moe_layer(index)]


@dataclass(frozen=True)
class LeadingDenseLayers:
    """first_k_dense_replace (DeepSeek)."""

    default: int
    name: str = "first_k_dense_replace"

    def read(self, hf: HFConfig, fields: Fields) -> Fields:
        return {"moe.first_k_dense_replace": hf.take(self.name, int, self.default)}

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {self.name: config.moe.first_k_dense_replace if config.moe else None}


@dataclass(frozen=True)
class DenseLayersByName:
    """mlp_only_layers and decoder_sparse_step (Qwen)."""

    def read(self, hf: HFConfig, fields: Fields) -> Fields:
        named = hf.take_list("mlp_only_layers", int, ())
        step = hf.take("decoder_sparse_step", int, 1)
        if step < 1:
            raise MoesaicError(f"config.json: decoder_sparse_step is {step}; it must be 1 or above")
        layers = range(fields["num_hidden_layers"])
        return dense_layer_fields([index for index in layers if index in named or (index + 1) % step])

    def write(self, config: ModelConfig) -> dict[str, Any]:
        return {"mlp_only_layers": dense_layers(config), "decoder_sparse_step": 1}


def sizes(*, max_position_embeddings: int, rms_norm_eps: float = 1e-6, tied: bool = False) -> tuple[KeyPart, ...]:
    """The keys that all decoders spell alike, with a family's defaults. `num_hidden_layers` comes first, because
    others need it."""
    return (
        Key("num_hidden_layers", "num_hidden_layers", int, most=MAX_LAYERS),
        Key("vocab_size", "vocab_size", int),
        Key("max_position_embeddings", "max_position_embeddings", int, max_position_embeddings),
        Key("rms_norm_eps", "rms_norm_eps", float, rms_norm_eps),
        Key("tie_word_embeddings", "tie_word_embeddings", bool, tied),
        InitializerRange(),
        Only("hidden_act", "silu", ("swish",)),
    )
