"""Presets against what the authors of the models print."""

import math

import pytest

from moesaic.accounting import count_parameters
from moesaic.config import ModelConfig
from moesaic.config_io import from_mapping
from moesaic.presets import PRESETS
from moesaic.published_models import PUBLISHED

GAPS = {
    # The paper prints 1.04 T; its own config.json gives 1.026 T, and counting 61 sparse layers in the place of 60 gives
    # 1.043 T.
    ("kimi-k2", "total"): 0.014,
}


def off_by(ours: float, published: float) -> float:
    """The share by which a figure is off, beyond what rounding to the printed digits may have changed."""
    digits = f"{published:.12g}".rstrip("0").replace(".", "")
    step = 10 ** (math.floor(math.log10(published)) - len(digits.rstrip("0")) + 1)
    return max(0.0, abs(ours - published) - step / 2) / published if abs(ours / published - 1) > 0.01 else 0.0


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_that_are_published(name: str) -> None:
    model = PUBLISHED[name]
    config = from_mapping(ModelConfig, model.config)
    count, extra = count_parameters(config), sum(model.extra.values())
    assert off_by(count.total + extra, model.total) <= GAPS.get((name, "total"), 0.0), count
    if model.active is not None:
        table = config.vocab_size * config.hidden_size
        left_out = {"": 0, "input embedding": table, "embeddings": 2 * table}[model.active_excludes]
        assert off_by(count.active + extra - left_out, model.active) == 0.0, count
    assert model.source


@pytest.mark.parametrize(("ours", "published"), [(38.0e9, 37e9), (1.05e12, 1.04e12 * 0.98), (13.2e9, 12.9e9)])
def test_a_wrong_count_is_noticed(ours: float, published: float) -> None:
    assert off_by(ours, published) > 0.0


def test_shapes_that_a_config_cannot_express_are_no_presets_to_train() -> None:
    expressible = {name for name, one in PUBLISHED.items() if not one.extra and "layer_types" not in one.config}
    assert expressible <= PRESETS.keys()
    assert not (PUBLISHED.keys() - expressible) & PRESETS.keys()
    assert {"demo-sparse", "demo-dense"} <= PRESETS.keys()


def test_a_hybrid_keeps_keys_in_its_attention_layers_only() -> None:
    model = PUBLISHED["lfm2-8b-a1b"]
    convolutions = model.config["num_hidden_layers"] - (model.kv_layers or 0)
    assert convolutions == 18
    assert f"{convolutions} layers" in next(iter(model.extra))
