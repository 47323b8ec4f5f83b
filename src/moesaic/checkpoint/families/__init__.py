"""Model families of the Hugging Face ecosystem that we read and write, by their `model_type`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from moesaic.checkpoint.families import glm4_moe, qwen3, qwen3_moe
from moesaic.checkpoint.families.rules import Layout
from moesaic.config import ModelConfig
from moesaic.errors import MoesaicError


@dataclass(frozen=True)
class Family:
    """How one `model_type` says what our ModelConfig says, and where it keeps the tensors."""

    model_type: str
    config_from_hf: Callable[[Mapping[str, Any]], ModelConfig]
    """Raises MoesaicError for a key or value that is not supported, by name."""
    config_to_hf: Callable[[ModelConfig], dict[str, Any]]
    """Raises MoesaicError for what the family cannot express, by name."""
    layout: Callable[[ModelConfig], Layout]


FAMILIES = {
    "qwen3": Family("qwen3", qwen3.config_from_hf, qwen3.config_to_hf, qwen3.layout),
    "qwen3_moe": Family("qwen3_moe", qwen3_moe.config_from_hf, qwen3_moe.config_to_hf, qwen3_moe.layout),
    "glm4_moe": Family("glm4_moe", glm4_moe.config_from_hf, glm4_moe.config_to_hf, glm4_moe.layout),
}

FAMILY_OF_ROUTER = {"softmax_topk": "qwen3_moe", "sigmoid_topk": "glm4_moe"}


def family_of(model_type: object) -> Family:
    """The family of a config.json. Raises MoesaicError when it is not one of ours."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise MoesaicError(
            f"model_type {model_type!r} is not supported; the families read here are {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def family_for_export(config: ModelConfig) -> Family:
    """The family that a model of ours is written as. Raises MoesaicError when no family has its router."""
    if config.moe is None:
        return FAMILIES["qwen3"]
    if config.moe.router not in FAMILY_OF_ROUTER:
        raise MoesaicError(
            f"no Hugging Face family has the router {config.moe.router!r}, so this model cannot be exported; "
            f"these can: {', '.join(FAMILY_OF_ROUTER)}"
        )
    return FAMILIES[FAMILY_OF_ROUTER[config.moe.router]]
