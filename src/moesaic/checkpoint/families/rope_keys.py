"""The keys of rotary positions: `rope_parameters` of transformers 5, and `rope_theta` with `rope_scaling` before it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moesaic.checkpoint.families.hf_config import HFConfig
from moesaic.checkpoint.families.keys import Fields
from moesaic.config import ModelConfig, RopeScaling

_YARN = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
_SCALING_KEYS = {
    "linear": ("factor",),
    "dynamic": ("factor", "alpha"),
    "yarn": ("factor", "original_max_position_embeddings", *_YARN),
    "longrope": (
        "factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor",
        "short_mscale", "long_mscale",
    ),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}  # fmt: skip
_WITHOUT_EFFECT = {"dynamic": ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")}


@dataclass(frozen=True)
class Rope:
    """Base, share of the head, and scaling."""

    default_theta: float = 10000.0
    default_partial: float | None = None
    """Share that is turned when the config does not say; None: the family turns whole heads, and has no such key."""
    default_block: Mapping[str, Any] | None = None
    """rope_parameters when the config has none."""

    def read(self, hf: HFConfig, fields: Fields) -> Fields:
        scaling, parameters = hf.take("rope_scaling", dict, None), hf.take("rope_parameters", dict, None)
        block = HFConfig({"model_type": hf.model_type, **(scaling or parameters or self.default_block or {})})
        theta = block.take("rope_theta", float, hf.take("rope_theta", float, self.default_theta))
        partial = self._partial(hf, block)
        rope_type = block.take("rope_type", str, block.take("type", str, "default"))
        rope_type = "longrope" if rope_type == "su" else rope_type
        if rope_type != "default" and rope_type not in _SCALING_KEYS:
            raise block.unsupported("rope_type", ", ".join(["default", *_SCALING_KEYS]))
        scaling_fields = {key: _take(block, key) for key in _SCALING_KEYS.get(rope_type, ()) if key in block}
        if rope_type == "default":
            block.ignore("factor", "original_max_position_embeddings")
        elif "original_max_position_embeddings" in hf:
            original = hf.take("original_max_position_embeddings", int, None)
            scaling_fields["original_max_position_embeddings"] = original
        block.ignore(*_WITHOUT_EFFECT.get(rope_type, ()))
        block.finish()
        given = {key: value for key, value in scaling_fields.items() if value is not None}
        return {
            "rope_theta": theta,
            "partial_rotary_factor": partial,
            "rope_scaling": None if rope_type == "default" else RopeScaling(rope_type=rope_type, **given),  # type: ignore[arg-type]
        }

    def _partial(self, hf: HFConfig, block: HFConfig) -> float:
        if self.default_partial is None:
            hf.only("partial_rotary_factor", 1.0)
            block.only("partial_rotary_factor", 1.0)
            return 1.0
        outer: float = hf.take("partial_rotary_factor", float, self.default_partial)
        inner: float = block.take("partial_rotary_factor", float, outer)
        return inner

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """The form of transformers 5 and, for readers of the older form (vLLM, llama.cpp's converter), that as well."""
        base = {"rope_theta": config.rope_theta}
        if self.default_partial is not None:
            base["partial_rotary_factor"] = config.partial_rotary_factor
        if config.rope_scaling is None:
            return {"rope_parameters": {"rope_type": "default", **base}, **base}
        names = _SCALING_KEYS[config.rope_scaling.rope_type]
        values = {name: getattr(config.rope_scaling, name) for name in names}
        given = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        scaling: dict[str, Any] = {"rope_type": config.rope_scaling.rope_type}
        scaling |= {name: value for name, value in given.items() if value is not None}
        return {"rope_parameters": {**scaling, **base}, "rope_scaling": scaling, **base}


def _take(block: HFConfig, key: str) -> Any:
    if key.endswith(("short_factor", "long_factor")):
        values = tuple(block.take(key, list, ()))
        if any(type(value) not in (int, float) for value in values):
            raise block.unsupported(key, "a list of numbers")
        return values
    if key == "truncate":
        return block.take(key, bool, None)
    if key == "original_max_position_embeddings":
        return block.take(key, int, None)
    return block.take(key, float, None)
