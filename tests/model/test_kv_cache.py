"""What the cache holds, and how much memory that takes."""

from dataclasses import replace

import pytest
import torch

from moesaic.config import MLAConfig, ModelConfig
from moesaic.errors import MoesaicError
from moesaic.model.kv_cache import KVCache

GROUPED = ModelConfig(
    vocab_size=8, hidden_size=8, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=6,
    intermediate_size=8,
)  # fmt: skip
LATENT = replace(
    GROUPED,
    num_key_value_heads=4,
    qk_norm="none",
    mla=MLAConfig(kv_lora_rank=10, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=5),
)


def test_grouped_query_attention_caches_keys_and_values_of_its_heads() -> None:
    kv = KVCache(GROUPED, batch_size=5, capacity=7)
    assert kv.keys.shape == kv.values.shape == (3, 5, 2, 7, 6)


def test_latent_attention_caches_one_latent_and_one_key_per_token() -> None:
    """12 numbers per token and layer, where keys and values of 4 heads would take 4 x (6 + 5)."""
    kv = KVCache(LATENT, batch_size=5, capacity=7)
    assert kv.keys.shape == (3, 5, 1, 7, 12)
    assert kv.values.nbytes == 0


@pytest.mark.parametrize("config", [GROUPED, LATENT])
def test_what_was_written_comes_back_in_order(config: ModelConfig) -> None:
    kv = KVCache(config, batch_size=2, capacity=7, dtype=torch.float64)
    heads, key_size, value_size = kv.keys.shape[2], kv.keys.shape[-1], kv.values.shape[-1]
    keys = torch.randn(2, heads, 5, key_size, dtype=torch.float64)
    values = torch.randn(2, heads, 5, value_size, dtype=torch.float64)
    kv.extend(torch.tensor([[-1, 0, 1], [0, 1, 2]]))
    kv.write(1, keys[:, :, :3], values[:, :, :3])
    assert kv.next_positions.tolist() == [2, 3]
    kv.extend(kv.next_positions[:, None] + torch.arange(2))
    all_keys, all_values = kv.write(1, keys[:, :, 3:], values[:, :, 3:])
    assert torch.equal(all_keys, keys)
    assert torch.equal(all_values, values)
    assert kv.positions.tolist() == [[-1, 0, 1, 2, 3, -1, -1], [0, 1, 2, 3, 4, -1, -1]]
    assert not kv.keys[[0, 2]].any()


def test_more_tokens_than_the_capacity_are_refused_and_change_nothing() -> None:
    kv = KVCache(GROUPED, batch_size=1, capacity=4)
    kv.extend(torch.arange(3)[None])
    with pytest.raises(MoesaicError, match="holds 4 tokens and 5 are needed; make it with capacity=5 or more"):
        kv.extend(torch.arange(3, 5)[None])
    assert (kv.length, kv.capacity) == (3, 4)
    assert kv.positions.tolist() == [[0, 1, 2, -1]]


def test_another_number_of_sequences_is_refused_and_changes_nothing() -> None:
    kv = KVCache(GROUPED, batch_size=1, capacity=4)
    with pytest.raises(MoesaicError, match="is for 1 sequences, and 3 come; make it with batch_size=3"):
        kv.extend(torch.zeros(3, 1, dtype=torch.int64))
    assert kv.length == 0


def test_layers_that_tokens_pass_by_remember_which_did_not() -> None:
    kv = KVCache(replace(GROUPED, depth_layers=(0, 2)), batch_size=2, capacity=6)
    assert sorted(kv.layer_positions) == [0, 2]
    kv.extend(torch.tensor([[-1, 0, 1], [0, 1, 2]]))
    first = kv.extend_layer(2, torch.tensor([[-1, 0, -1], [-1, -1, 2]]))
    assert first.tolist() == [[-1, 0, -1], [-1, -1, 2]]
    assert kv.next_positions.tolist() == [2, 3]
    kv.extend(kv.next_positions[:, None])
    assert kv.extend_layer(2, torch.tensor([[2], [-1]])).tolist() == [[-1, 0, -1, 2], [-1, -1, 2, -1]]
    assert (kv.layer_positions[0] == -1).all()
    assert kv.positions.tolist() == [[-1, 0, 1, 2, -1, -1], [0, 1, 2, 3, -1, -1]]
