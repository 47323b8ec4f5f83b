"""Reading a Hugging Face config.json strictly: every key is honoured, known to have no effect, or refused by name."""

import difflib
from collections.abc import Mapping
from typing import Any

from moesaic.config import ModelConfig
from moesaic.errors import MoesaicError

REQUIRED: Any = object()

NO_EFFECT = {
    "architectures", "auto_map", "chunk_size_feed_forward", "dtype", "id2label", "is_encoder_decoder", "label2id",
    "model_type", "output_attentions", "output_hidden_states", "output_router_logits", "pad_token_id", "problem_type",
    "return_dict", "router_aux_loss_coef", "tokenizer_class", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip


class HFConfig:
    """The keys of one config.json. What `finish` finds untouched is a feature nobody asked about: it is refused."""

    def __init__(self, values: Mapping[str, Any]):
        self.values = values
        self.model_type = values["model_type"]
        self._seen = {key for key in values if key in NO_EFFECT or key.startswith(("_", "unsloth"))}

    def take(self, key: str, kind: type, default: Any = REQUIRED) -> Any:
        """The value of `key`, or `default` when it is absent or null."""
        self._seen.add(key)
        value = self.values.get(key)
        if value is None:
            if default is REQUIRED:
                raise MoesaicError(f"config.json of this {self.model_type} model has no {key}; add it")
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise MoesaicError(f"config.json: {key} is {value!r}; it must be of type {kind.__name__}")
        return value

    def only(self, key: str, *allowed: Any) -> None:
        """Refuses values of `key` other than `allowed`; absent and null always pass."""
        self._seen.add(key)
        value = self.values.get(key)
        if value is not None and value not in allowed:
            raise unsupported(self.model_type, key, value, " or ".join(repr(choice) for choice in allowed))

    def ignore(self, *keys: str) -> None:
        self._seen.update(keys)

    def finish(self) -> None:
        for key, value in self.values.items():
            if key not in self._seen and value not in (None, False, [], {}):
                nearest = difflib.get_close_matches(key, self._seen, n=1)
                hint = f"did you mean {nearest[0]}?" if nearest else "delete it if it does not change what is computed"
                raise MoesaicError(f"config.json: {key} = {value!r} is not known for {self.model_type}; {hint}")


def unsupported(model_type: str, key: str, value: object, supported: str) -> MoesaicError:
    return MoesaicError(f"config.json: {key} = {value!r} is not supported for {model_type}, only {supported}")


def read_decoder(
    hf: HFConfig, *, default_head_dim: int | None = None, default_partial_rotary_factor: float = 1.0
) -> dict[str, Any]:
    """The fields of ModelConfig that all families spell alike. Defaults are those of transformers."""
    hf.only("hidden_act", "silu")
    hf.only("attention_dropout", 0.0)
    hf.only("quantization_config")
    hf.ignore("eos_token_id")
    hidden_size = hf.take("hidden_size", int)
    num_attention_heads = hf.take("num_attention_heads", int)
    if num_attention_heads < 1:
        raise MoesaicError(f"config.json: num_attention_heads is {num_attention_heads}; it must be above 0")
    return {
        "vocab_size": hf.take("vocab_size", int),
        "hidden_size": hidden_size,
        "num_hidden_layers": hf.take("num_hidden_layers", int),
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": hf.take("num_key_value_heads", int),
        "head_dim": hf.take("head_dim", int, default_head_dim or hidden_size // num_attention_heads),
        "intermediate_size": hf.take("intermediate_size", int),
        "max_position_embeddings": hf.take("max_position_embeddings", int),
        "rms_norm_eps": hf.take("rms_norm_eps", float),
        **_read_rope(hf, default_partial_rotary_factor),
        "attention_bias": hf.take("attention_bias", bool, False),
        "tie_word_embeddings": hf.take("tie_word_embeddings", bool, False),
        "initializer_range": hf.take("initializer_range", float, 0.02),
        "bos_token_id": hf.take("bos_token_id", int, None),
        "eos_token_ids": token_ids(hf.values.get("eos_token_id")),
    }


def token_ids(value: Any) -> tuple[int, ...]:
    """eos_token_id as Hugging Face writes it: null, one id, or a list."""
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token_id) is int for token_id in ids):
        raise MoesaicError(f"eos_token_id is {value!r}; it must be an integer or a list of integers")
    return tuple(ids)


def _read_rope(hf: HFConfig, default_partial_rotary_factor: float) -> dict[str, float]:
    """rope_parameters of transformers 5, or the older rope_theta, partial_rotary_factor and rope_scaling."""
    values = {
        "rope_theta": hf.take("rope_theta", float, 10000.0),
        "partial_rotary_factor": hf.take("partial_rotary_factor", float, default_partial_rotary_factor),
    }
    for block in ("rope_scaling", "rope_parameters"):
        rope = HFConfig({"model_type": hf.model_type, **hf.take(block, dict, {})})
        rope.only("rope_type", "default")
        rope.only("type", "default")
        values = {key: rope.take(key, float, value) for key, value in values.items()}
        rope.finish()
    return values


def write_decoder(config: ModelConfig, *, model_type: str, architecture: str) -> dict[str, Any]:
    """The keys that all families spell alike. Rope is written in the form of transformers 5 and, for readers of the
    older form (vLLM, llama.cpp's converter), at top level as well."""
    rope = {"rope_theta": config.rope_theta, "partial_rotary_factor": config.partial_rotary_factor}
    if config.partial_rotary_factor == 1.0 and model_type != "glm4_moe":
        del rope["partial_rotary_factor"]
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", **rope},
        **rope,
        "attention_bias": config.attention_bias,
        "attention_dropout": 0.0,
        "tie_word_embeddings": config.tie_word_embeddings,
        "initializer_range": config.initializer_range or config.hidden_size**-0.5,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos_as_hf(config.eos_token_ids),
        "use_cache": True,
    }


def eos_as_hf(ids: tuple[int, ...]) -> int | list[int] | None:
    return list(ids) if len(ids) > 1 else ids[0] if ids else None
