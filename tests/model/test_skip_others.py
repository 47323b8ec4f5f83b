"""A pass that leaves out, in its last feed-forward, the tokens whose logits nobody asks for."""

import random
from dataclasses import replace

import pytest
import torch

from moesaic.config import ModelConfig, MoEConfig
from moesaic.errors import UsageError
from moesaic.model.paged_kv import NewTokens
from moesaic.model.quantize import make_quantization, quantize_model
from moesaic.ops import Routing, instruction_set
from moesaic.ops.instruction_set import native_module

from .paged import unwritten
from .test_block_step import SERVED
from .test_paged_kv import CONFIGS, assert_close, random_texts
from .test_quantize import BASE, EXPERTS, random_model

needs_kernels = pytest.mark.skipif(native_module() is None, reason="the kernels are not built here")
LENGTHS = (40, 7)


def some_tokens() -> torch.Tensor:
    """Few, many, none, or all, in any order."""
    number = random.choice((0, 1, random.randint(2, 46), 47))
    return torch.randperm(47)[:number]


@torch.no_grad()
def logits_of(model: torch.nn.Module, config: ModelConfig, kept: torch.Tensor, skip: bool) -> list[torch.Tensor]:
    """Of the tokens that are kept, of some that come after all, and the routing of the last layer."""
    kv = unwritten(config, 4, torch.float32)
    torch.manual_seed(int(kept.sum()))  # the same texts, whether or not others are skipped
    tokens, later = torch.cat(random_texts(*LENGTHS)), torch.cat(random_texts(2, 2))
    batch = kv.batch([NewTokens([2, 0], 0, 40), NewTokens([1], 0, 7)])
    routings = list[Routing]()
    some = model(tokens[None], kv=batch, routings=routings, logits_to_keep=kept, skip_others=skip)
    after = kv.batch([NewTokens([2, 0], 40, 2), NewTokens([1], 7, 2)])
    then = model(later[None], kv=after)
    last = routings[-1]
    chosen = torch.zeros(last.num_tokens, last.num_experts).index_put(
        (last.token_ids, last.expert_ids), last.weights.float()
    )
    assert all(routing.num_tokens == 47 for routing in routings[:-1])
    return [some[0], then[0], chosen]


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("name", [name for name, config in CONFIGS.items() if config.moe is not None])
def test_what_is_kept_is_as_if_all_were(monkeypatch: pytest.MonkeyPatch, name: str, kernels: bool) -> None:
    if not kernels:
        monkeypatch.setattr(instruction_set, "_load_native", lambda: (None, "not built"))
    config = CONFIGS[name]
    model, kept = random_model(config), some_tokens()
    whole, then, chosen = logits_of(model, config, kept, skip=False)
    got, got_then, got_chosen = logits_of(model, config, kept, skip=True)
    assert got.shape == (len(kept), config.vocab_size)
    assert chosen.shape[0] == 47
    assert_close(got_then, then, 1e-5)
    if len(kept):
        assert_close(got, whole, 1e-5)
        assert_close(got_chosen, chosen[kept], 1e-5)
    assert got_chosen.shape[0] == len(kept)


@needs_kernels
@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("name", SERVED)
def test_a_packed_model_gives_the_same_bits(name: str, scheme: str) -> None:
    config = SERVED[name]
    model, kept = random_model(config), some_tokens()
    quantize_model(model, make_quantization(scheme, config))
    whole, then, chosen = logits_of(model, config, kept, skip=False)
    got, got_then, got_chosen = logits_of(model, config, kept, skip=True)
    assert torch.equal(got, whole)
    assert torch.equal(got_then, then)
    assert torch.equal(got_chosen, chosen[kept])


def test_without_a_cache_too() -> None:
    model, tokens = random_model(CONFIGS["heads normalised"]), torch.stack(random_texts(20, 20))
    expected = model(tokens)
    routings = list[Routing]()
    assert_close(model(tokens, routings=routings, logits_to_keep=3, skip_others=True), expected[:, -3:], 1e-5)
    assert [routing.num_tokens for routing in routings] == [40, 40, 6]


def test_routers_that_see_all_tokens_still_do() -> None:
    config = ModelConfig(**BASE, moe=MoEConfig(**EXPERTS, router="expert_choice"))
    model, tokens = random_model(config), torch.stack(random_texts(20, 20))
    routings = list[Routing]()
    got = model(tokens, routings=routings, logits_to_keep=3, skip_others=True)
    assert_close(got, model(tokens)[:, -3:], 1e-5)
    assert routings[-1].num_tokens == 40


def test_a_hash_of_the_token_is_that_of_its_own() -> None:
    config = ModelConfig(**BASE, moe=replace(MoEConfig(**EXPERTS), router="hash"))
    model, kept = random_model(config), torch.tensor([5, 41, 3])
    _, _, chosen = logits_of(model, config, kept, skip=False)
    assert torch.equal(logits_of(model, config, kept, skip=True)[2], chosen[kept])


@pytest.mark.parametrize("kept", [[0, 20], [-1]])
def test_tokens_that_are_not_there(kept: list[int]) -> None:
    model, tokens = random_model(CONFIGS["heads normalised"]), torch.stack(random_texts(20))
    with pytest.raises(UsageError, match=r"logits of tokens -?\d+ to -?\d+ are to be kept, of 20"):
        model(tokens, logits_to_keep=torch.tensor(kept), skip_others=True)
