"""Reading a Hugging Face config.json strictly: every key is honoured, known to have no effect, or refused by name."""

import difflib
from collections.abc import Mapping
from typing import Any

from moesaic.errors import MoesaicError

MAX_INTEGER = 2**40
REQUIRED: Any = object()
LIKE_ABSENT: Any = object()

NO_EFFECT = {
    # what the file is, and what surrounds the model
    "architectures", "auto_map", "chunk_size_feed_forward", "dtype", "id2label", "is_encoder_decoder", "label2id",
    "model_type", "name_or_path", "output_attentions", "output_hidden_states", "output_router_logits", "pad_token_id",
    "problem_type", "return_dict", "tokenizer_class", "torch_dtype", "transformers_version", "use_cache",
    # what only training by others uses; ours has settings of its own
    "attention_dropout", "input_jitter_noise", "router_aux_loss_coef", "router_jitter_noise",
    # how others cut or compute the same numbers
    "ep_size", "pretraining_tp", "quantization_config",
}  # fmt: skip


class HFConfig:
    """The keys of one config.json. What `finish` finds untouched is a feature nobody asked about: it is refused.

    Keys of the blocks named in `nested` are asked for as `block.key`.
    """

    def __init__(self, values: Mapping[str, Any], nested: tuple[str, ...] = ()):
        self.model_type = values["model_type"]
        self.values = dict(values)
        for block in nested:
            inner = self.values.pop(block, None)
            if inner is not None and not isinstance(inner, Mapping):
                raise MoesaicError(f"config.json: {block} is {shortened(inner)}; it must be an object")
            self.values |= {f"{block}.{key}": value for key, value in (inner or {}).items()}
        self._seen = {key for key in self.values if _has_no_effect(key)}

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def take(self, key: str, kind: type, default: Any = REQUIRED, null: Any = LIKE_ABSENT) -> Any:
        """The value of `key`; `default` when it is absent, `null` (as a rule the default) when it is null."""
        self._seen.add(key)
        value = self.values.get(key)
        if value is None:
            value = null if key in self.values and null is not LIKE_ABSENT else default
            if value is REQUIRED:
                raise MoesaicError(f"config.json of this {self.model_type} model has no {key}; add it")
            return value
        if type(value) is int and kind in (int, float) and abs(value) > MAX_INTEGER:
            raise MoesaicError(f"config.json: {key} is {shortened(value)}; no size of a model is that large")
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise MoesaicError(f"config.json: {key} is {shortened(value)}; it must be of type {kind.__name__}")
        return value

    def take_list(self, key: str, kind: type, default: Any = REQUIRED) -> Any:
        """A list of one kind, as a tuple."""
        values = self.take(key, list, default)
        if isinstance(values, list) and any(type(value) is not kind for value in values):
            raise MoesaicError(f"config.json: {key} is {shortened(values)}; it must be a list of {kind.__name__}")
        return tuple(values) if isinstance(values, list) else values

    def only(self, key: str, *allowed: Any) -> None:
        """Refuses values of `key` other than `allowed`; absent and null always pass."""
        self._seen.add(key)
        value = self.values.get(key)
        if value is not None and value not in allowed:
            raise self.unsupported(key, " or ".join(repr(choice) for choice in allowed))

    def ignore(self, *keys: str) -> None:
        self._seen.update(keys)

    def unsupported(self, key: str, supported: str) -> MoesaicError:
        value = shortened(self.values.get(key))
        return MoesaicError(f"config.json: {key} = {value} is not supported for {self.model_type}, only {supported}")

    def finish(self) -> None:
        """Refuses a key that nobody asked about, unless its value switches off what it names: null, false, 0, empty."""
        for key, value in self.values.items():
            if key not in self._seen and value not in (None, False, [], {}):
                nearest = difflib.get_close_matches(key[:100], self._seen, n=1)
                hint = f"did you mean {nearest[0]}?" if nearest else "delete it if it does not change what is computed"
                name = key if key.isascii() and key.isprintable() and len(key) < 80 else shortened(key)
                raise MoesaicError(
                    f"config.json: {name} = {shortened(value)} is not known for {self.model_type}; {hint}"
                )


def _has_no_effect(key: str) -> bool:
    leaf = key.rpartition(".")[2]
    return leaf in NO_EFFECT or leaf.startswith(("_", "unsloth"))


def shortened(value: object) -> str:
    """A value of somebody's file, short enough for one line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"
