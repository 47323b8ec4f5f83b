"""Named models: fields of `ModelConfig` to start from, in TOML as `preset = "NAME"`.

`demo-sparse` and `demo-dense` are twins: the same attention, and per token the same feed-forward work. The others have
the shapes of published models; those that a config cannot express in full, or that name every layer, are for
`moesaic plan` alone.
"""

from collections.abc import Mapping
from typing import Any

from moesaic.published_models import PUBLISHED

_DEMO = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "initializer_range": 0.0,
}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "demo-sparse": {
        **_DEMO,
        "moe": {
            "num_experts": 32,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 64,
            "router": "sigmoid_topk",
            "routed_scaling_factor": 4.0,
        },
    },
    # 8 units wider than 4 x 64: the router's work, given to the dense twin.
    "demo-dense": {**_DEMO, "intermediate_size": 264},
    **{name: one.config for name, one in PUBLISHED.items() if not one.extra and "layer_types" not in one.config},
}
