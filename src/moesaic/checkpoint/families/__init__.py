"""Model families of the Hugging Face ecosystem that we read and write, by their `model_type`."""

import difflib

from moesaic.checkpoint.families import (
    dbrx,
    deepseek_v2,
    deepseek_v3,
    dots1,
    ernie4_5_moe,
    flex_olmo,
    glm4_moe,
    gpt_oss,
    granitemoe,
    granitemoeshared,
    hunyuan_v1_moe,
    llama,
    llama4_text,
    minimax_m2,
    mistral,
    mixtral,
    olmo2,
    olmoe,
    phimoe,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
)
from moesaic.checkpoint.families.family import Family
from moesaic.config import ModelConfig
from moesaic.errors import MoesaicError
from moesaic.moe_config import PUBLISHED_ROUTERS

# In the order in which a model that was made here is offered to them: the first that can express it is written.
FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        qwen3.FAMILY,
        qwen3_moe.FAMILY,
        glm4_moe.FAMILY,
        llama.FAMILY,
        mistral.FAMILY,
        qwen2.FAMILY,
        olmo2.FAMILY,
        mixtral.FAMILY,
        qwen2_moe.FAMILY,
        deepseek_v2.FAMILY,
        deepseek_v3.FAMILY,
        dots1.FAMILY,
        ernie4_5_moe.FAMILY,
        minimax_m2.FAMILY,
        hunyuan_v1_moe.FAMILY,
        olmoe.FAMILY,
        flex_olmo.FAMILY,
        gpt_oss.FAMILY,
        phimoe.FAMILY,
        granitemoe.FAMILY,
        granitemoeshared.FAMILY,
        dbrx.FAMILY,
        llama4_text.FAMILY,
    )
}

# Models that take more than text. Their language model is read, and is then a model of its own family.
LANGUAGE_MODELS: dict[str, Family] = {"llama4": llama4_text.BESIDE_VISION}

# Published names of models that have the form of another family, and are written as that one.
SAME_FORM: dict[str, Family] = {"kimi_k2": deepseek_v3.FAMILY}


def family_of(model_type: object) -> Family:
    """The family of a config.json. Raises MoesaicError when it is not one of ours; the nearest is named."""
    known = FAMILIES | LANGUAGE_MODELS | SAME_FORM
    if isinstance(model_type, str) and model_type in known:
        return known[model_type]
    nearest = difflib.get_close_matches(str(model_type)[:100], known, n=1, cutoff=0.6)
    hint = f"did you mean {nearest[0]}? " if nearest else ""
    raise MoesaicError(
        f"model_type {str(model_type)[:100]!r} is not supported; {hint}"
        f"The families read here are {', '.join(sorted(known))}"
    )


def has_family(config: ModelConfig) -> bool:
    """Whether the model can be exported."""
    try:
        family_for_export(config)
    except MoesaicError:
        return False
    return True


def family_for_export(config: ModelConfig) -> Family:
    """The family that a model is written as: its own, or for one that was made here the first that can express it.

    Raises MoesaicError that names, for the nearest family, what it cannot express.
    """
    if config.model_type:
        family_of(config.model_type).config_to_hf(config)
        return family_of(config.model_type)
    if config.moe is not None and config.moe.router not in PUBLISHED_ROUTERS:
        raise MoesaicError(
            f"no Hugging Face family has the router {config.moe.router}: this model trains and runs here (also with "
            "--quantization), but cannot be written as a Hugging Face directory; the routers that can be are "
            f"{', '.join(PUBLISHED_ROUTERS)}"
        )
    lost = {}
    for family in FAMILIES.values():
        if family.sparse == (config.moe is not None):
            _, lost[family.model_type] = family.try_to_write(config)
            if not lost[family.model_type]:
                return family
    nearest = min(lost, key=lambda name: len(lost[name]))
    raise MoesaicError(
        "no Hugging Face family can express this model: it trains and runs here (also with --quantization), but cannot "
        f"be written as a Hugging Face directory; the nearest is {nearest}, in which {'; '.join(lost[nearest])}"
    )
