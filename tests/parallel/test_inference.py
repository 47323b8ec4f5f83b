"""A model whose experts are on other ranks says what it says in one process.

T tokens, V vocabulary.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.config import EngineConfig, ModelConfig
from moesaic.engine.engine import Engine
from moesaic.engine.request import Request
from moesaic.model.kv_cache import KVCache
from moesaic.model.paged_kv import NewTokens, PagedKV
from moesaic.model.quantize import make_quantization, quantize_model
from moesaic.model.transformer import Transformer
from moesaic.ops.instruction_set import native_module
from moesaic.parallel.inference import (
    Company,
    Leader,
    LeadingDispatcher,
    LostRankError,
    follow,
    lead,
    leader_of,
)
from tests.engine.helpers import CONFIG, TOKENIZER, alone, greedy, ids_of, make_model, random_ids, run

from .processes import on_ranks

Work = Callable[[Transformer, Leader], Any]
ROUTERS: dict[str, dict[str, Any]] = {
    "shared experts": {"router": "sigmoid_topk", "n_shared_experts": 1},
    "weighs inputs": {"router": "topk_sigmoid_input"},
    "expert biases": {"projection_bias": True},
    "free experts": {"num_zero_experts": 1, "num_copy_experts": 1},
    "soft": {"router": "soft", "slots_per_expert": 2},
}


def led(model: Transformer, work: Work) -> Any:
    """On the first rank what `work` returns, whose passes the others help with; there, whether that ended well."""
    company = Company()
    for layer in model.moe_layers:
        layer.experts.keep(*company.share.bounds(layer.experts.num_experts))
    if not company.share.is_first:
        try:
            follow(model, company)
        except LostRankError:
            return False
        return True
    leader = lead(model, company)
    answer = work(model, leader)
    leader.end()
    return answer


def sent_by(model: Transformer) -> list[int]:
    """Bytes that left the first rank, by layer."""
    dispatchers = [layer.dispatcher for layer in model.moe_layers]
    return [one.inner.exchange.bytes_sent for one in dispatchers if isinstance(one, LeadingDispatcher)]


def write(model: Transformer, requests: list[Request], config: EngineConfig) -> tuple[list[list[int]], list[int]]:
    engine = Engine(model, TOKENIZER, config)
    first, *others = requests
    texts = [*run(engine, [first]).values(), *run(engine, others).values()]
    assert not config.prefix_cache or engine.statistics().cached_tokens > 0
    return [ids_of(deltas) for deltas in texts], sent_by(model)


@pytest.mark.parametrize("count", [2, 3])
def test_texts_side_by_side_are_those_of_one_process(count: int) -> None:
    """With prompts in pieces, a known beginning and guessed tokens. Of 8 experts 3 ranks have 3, 3 and 2."""
    model, beginning = make_model(), random_ids(70)
    requests = [greedy(beginning + random_ids(length)) for length in (3, 40, 1, 20)] + [greedy(random_ids(5))]
    expected = [alone(model, request) for request in requests]
    config = EngineConfig(step_tokens=32, max_sequences=3, prompt_lookup=2)
    (texts, sent), *others = on_ranks(count, led, model, lambda model, _: write(model, requests, config))
    assert texts == expected
    assert len(sent) == len(model.moe_layers)
    assert min(sent) > 0
    assert all(others)


def logits_of(model: Transformer, tokens: Tensor, *, paged: bool) -> Tensor:
    """(T, V), computed in two passes where a cache can know the first."""
    length = tokens.shape[1]
    if model.config.looks_ahead:
        with torch.inference_mode():
            return model(tokens)[0]
    parts = tokens.split(length - 1, dim=1)
    cache = KVCache(model.config, batch_size=1, capacity=length, dtype=torch.float32, device=tokens.device)
    store = PagedKV(model.config, 2, torch.float32, tokens.device)
    with torch.inference_mode():
        if not paged:
            return torch.cat([model(part, kv=cache) for part in parts], dim=1)[0]
        batches = [
            store.batch([NewTokens([0, 1], past, new, length)]) for past, new in ((0, length - 1), (length - 1, 1))
        ]
        return torch.cat([model(part, kv=batch) for part, batch in zip(parts, batches, strict=True)], dim=1)[0]


def assert_same_logits(
    config: ModelConfig, count: int, quantization: str | None, hot: Any = (), *, paged: bool
) -> None:
    model, tokens_1T = make_model(config), torch.tensor([random_ids(33)])
    if quantization is not None:
        quantize_model(model, make_quantization(quantization, config, hot=hot))
    expected_TV = logits_of(model, tokens_1T, paged=paged)
    got_TV, *others = on_ranks(count, led, model, lambda model, _: logits_of(model, tokens_1T, paged=paged))
    assert all(others)
    # Packed experts round their inputs to 8 bits: a sum in another order may round to the neighbour.
    tolerance = 1e-4 if quantization is None else 3e-2
    assert float((got_TV - expected_TV).abs().max()) <= tolerance * float(expected_TV.abs().max())


@pytest.mark.parametrize("router", ROUTERS)
def test_every_kind_of_layer_is_led(router: str) -> None:
    assert CONFIG.moe is not None
    assert_same_logits(replace(CONFIG, moe=replace(CONFIG.moe, **ROUTERS[router])), 2, None, paged=False)


@pytest.mark.parametrize(("quantization", "count"), [("int4", 2), ("int4", 3), ("int8", 2)])
def test_packed_experts_are_shared_out(quantization: str, count: int) -> None:
    assert_same_logits(CONFIG, count, quantization, paged=True)


def test_a_rank_may_have_experts_of_one_precision_alone() -> None:
    assert_same_logits(CONFIG, 2, "int4", ((0, 1), (0, 6, 7), (4, 5, 6, 7)), paged=True)


@pytest.mark.skipif(native_module() is None, reason="needs the C++ kernels")
def test_a_block_in_one_call_stands_aside() -> None:
    model = make_model(quantization="int4")
    assert all(layer.is_plainly_packed for layer in model.moe_layers)  # type: ignore[attr-defined]
    request = greedy(random_ids(9), max_tokens=4)

    def work(model: Transformer, leader: Leader) -> tuple[list[bool], list[int]]:
        alone(model, request)
        return [layer.is_plainly_packed for layer in model.moe_layers], sent_by(model)  # type: ignore[attr-defined]

    (plain, sent), _ = on_ranks(2, led, model, work)
    assert plain == [False] * len(model.moe_layers)
    assert min(sent) > 0


def idle(model: Transformer, tokens: Tensor) -> Any:
    """With exchanges that time out sooner than anybody asks for something."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1))

    def work(model: Transformer, leader: Leader) -> Tensor:
        time.sleep(2.5)
        options = leader.company.control._get_backend(torch.device("cpu")).options  # type: ignore[attr-defined]
        assert options._timeout > timedelta(days=30)
        return logits_of(model, tokens, paged=False)

    return led(model, work)


def test_followers_wait_for_longer_than_an_exchange_may_take() -> None:
    model, tokens_1T = make_model(), torch.tensor([random_ids(5)])
    expected_TV = logits_of(model, tokens_1T, paged=False)
    got_TV, ended_well = on_ranks(2, idle, model, tokens_1T)
    torch.testing.assert_close(got_TV, expected_TV, rtol=1e-4, atol=1e-4)
    assert ended_well


def test_a_pass_that_fails_between_layers_is_repeated_and_one_that_fails_within_ends_them_all() -> None:
    model, request = make_model(), greedy(random_ids(9), max_tokens=4)
    expected = alone(model, request)

    def work(model: Transformer, leader: Leader) -> Any:
        engine = Engine(model, TOKENIZER)
        router, experts = model.moe_layers[1].router, model.moe_layers[1].experts
        router.forward, real = _failing, router.forward  # type: ignore[method-assign]
        between = run(engine, [request])
        router.forward = real  # type: ignore[method-assign]
        after = run(engine, [request])
        experts.forward, real = _failing, experts.forward  # type: ignore[method-assign]
        within = run(engine, [request])
        experts.forward = real  # type: ignore[method-assign]
        lost = run(engine, [request, request])
        assert leader_of(model) is leader
        errors = [str(deltas[-1].error) for deltas in (*between.values(), *within.values(), *lost.values())]
        return errors, ids_of(*after.values()), isinstance(leader.failure, LostRankError)

    (errors, ids, has_failed), ended_well = on_ranks(2, led, model, work)
    assert ids == expected
    assert ["MemoryError" in error for error in errors] == [True, True, False, False]
    assert all("in the middle of an exchange; start all ranks again" in error for error in errors[2:])
    assert has_failed
    assert not ended_well


def _failing(*_: Any, **__: Any) -> Any:
    raise MemoryError
