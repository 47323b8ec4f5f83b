"""Masks against their definition, position by position."""

from dataclasses import replace

import pytest
import torch

from moesaic.config import ModelConfig
from moesaic.model.attention_mask import attention_masks

from .attention_oracle import sees

CONFIG = ModelConfig(
    vocab_size=8, hidden_size=8, num_hidden_layers=4, num_attention_heads=1, num_key_value_heads=1, head_dim=8,
    intermediate_size=8, sliding_window=3, attention_chunk_size=4,
    layer_types=("full_attention", "sliding_attention", "chunked_attention", "sliding_attention"),
)  # fmt: skip


@pytest.mark.parametrize("new", [1, 4, 9])
def test_masks_equal_their_definition_with_padding_and_earlier_keys(new: int) -> None:
    keys = torch.stack([torch.cat([torch.full((pad,), -1), torch.arange(9 - pad)]) for pad in (0, 2, 6)])
    queries = keys[:, -new:]
    masks = attention_masks(CONFIG, queries, keys, plainly_causal=False)
    assert set(masks) == set(CONFIG.layer_types)
    for index, kind in enumerate(CONFIG.layer_types):
        mask = masks[kind]
        assert mask is not None
        assert mask.shape == (3, 1, new, 9)
        for row in range(3):
            for query, query_position in enumerate(queries[row].tolist()):
                for key, key_position in enumerate(keys[row].tolist()):
                    both_padding = query_position < 0 and key_position < 0
                    expected = both_padding or sees(CONFIG, index, query_position, key_position)
                    assert bool(mask[row, 0, query, key]) == expected


@pytest.mark.parametrize(("length", "hidden"), [(3, []), (4, ["sliding"]), (5, ["sliding", "chunked"])])
def test_what_is_plainly_causal_needs_no_mask(length: int, hidden: list[str]) -> None:
    positions = torch.arange(length).expand(2, length)
    masks = attention_masks(CONFIG, positions, positions, plainly_causal=True)
    assert {kind for kind, mask in masks.items() if mask is not None} == {f"{kind}_attention" for kind in hidden}
    general = attention_masks(CONFIG, positions, positions, plainly_causal=False)
    for kind, mask in masks.items():
        expected = general[kind]
        assert expected is not None
        shortcut = torch.ones(length, length, dtype=torch.bool).tril() if mask is None else mask
        assert torch.equal(shortcut.expand(2, 1, -1, -1), expected)


def test_only_the_types_that_layers_have_are_computed() -> None:
    positions = torch.arange(9)[None]
    config = replace(CONFIG, layer_types=())
    assert attention_masks(config, positions, positions, plainly_causal=True) == {"full_attention": None}
