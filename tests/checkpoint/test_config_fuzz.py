"""Whatever stands in a config.json, reading it gives a ModelConfig or one MoesaicError of one line, and quickly."""

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moesaic.checkpoint.families import FAMILIES, LANGUAGE_MODELS, SAME_FORM, family_of
from moesaic.config import ModelConfig
from moesaic.errors import MoesaicError
from moesaic.model.rope import rotary_tables

from .family_cases import FAMILY_CASES

PUBLISHED = {config.model_type: config.to_dict() for config in FAMILY_CASES.values()}
NESTED = ("rope_parameters", "rope_scaling", "attn_config", "ffn_config", "text_config")
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from([0, 1, 2, -1, 10**9, 2**63, 10**400, 1e308, 1e-320, math.nan, "default", "yarn", "longrope"])
    | st.sampled_from(["dynamic", "sliding_attention"])
)  # fmt: skip
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner))
KEYS = sorted({key for values in PUBLISHED.values() for key in values})
ROPE_KEYS = (
    "rope_type", "type", "factor", "rope_theta", "short_factor", "long_factor", "beta_fast", "alpha", "mscale",
    "mscale_all_dim", "partial_rotary_factor", "original_max_position_embeddings", "low_freq_factor",
)  # fmt: skip
CHANGES = st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=8), VALUES, max_size=4)
INNER = st.dictionaries(st.sampled_from(ROPE_KEYS) | st.sampled_from(KEYS) | st.text(max_size=8), VALUES, max_size=4)


@given(st.sampled_from([*FAMILIES, *LANGUAGE_MODELS, *SAME_FORM]), CHANGES, st.none() | st.sampled_from(NESTED), INNER)
@settings(max_examples=400)
def test_any_config_is_read_or_refused(
    model_type: str, changes: dict[str, Any], block: str | None, inner: dict[str, Any]
) -> None:
    values = PUBLISHED.get(model_type, {}) | changes
    if block is not None:
        values |= {block: {**(values.get(block) or {}), **inner} if isinstance(values.get(block), dict) else inner}
    values["model_type"] = model_type
    try:
        read: ModelConfig | MoesaicError = family_of(model_type).config_from_hf(values)
    except MoesaicError as error:
        read = error
    if isinstance(read, MoesaicError):
        assert "\n" not in str(read)
        assert len(str(read)) < 2000
    elif read.rotary_dim < 1000:
        assert all(table.isfinite().all() for table in rotary_tables(torch.arange(9)[None], read))


@given(VALUES)
def test_any_model_type_is_known_or_refused(model_type: Any) -> None:
    with pytest.raises(MoesaicError, match="is not supported"):
        family_of(json.loads(json.dumps({"model_type": model_type}))["model_type"])
