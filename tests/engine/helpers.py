"""Small models, and the texts that they write alone."""

from collections.abc import Iterable

import torch

from moesaic.config import EngineConfig, ModelConfig, MoEConfig, SamplingConfig
from moesaic.engine.engine import Engine
from moesaic.engine.request import Delta, Request
from moesaic.model.quantize import make_quantization, quantize_model
from moesaic.model.transformer import Transformer
from moesaic.tokenizer import byte_tokenizer

TOKENIZER = byte_tokenizer()
CONFIG = ModelConfig(
    vocab_size=TOKENIZER.vocab_size,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=512,
    initializer_range=0.3,
    qk_norm="head",
    moe=MoEConfig(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32),
)


def make_model(config: ModelConfig = CONFIG, quantization: str | None = None) -> Transformer:
    model = Transformer(config)
    model.init_weights(int(torch.randint(0, 2**31, ())))
    if quantization is not None:
        quantize_model(model, make_quantization(quantization, config))
    return model.eval()


def random_ids(count: int) -> list[int]:
    return torch.randint(0, 256, (count,)).tolist()


def greedy(ids: list[int], max_tokens: int = 16, **more: object) -> Request:
    sampling = SamplingConfig(max_tokens=max_tokens, temperature=0, ignore_eos=True)
    return Request(prompt_ids=ids, sampling=sampling, **more)  # type: ignore[arg-type]


def run(engine: Engine, requests: Iterable[Request], most_steps: int = 2000) -> dict[int, list[Delta]]:
    """All deltas of each request, in order, when all have ended."""
    deltas: dict[int, list[Delta]] = {engine.submit(request): [] for request in requests}
    for _ in range(most_steps):
        for handle, delta in engine.step():
            deltas[handle].append(delta)
        if not engine.has_work:
            return deltas
    raise AssertionError(f"there is work after {most_steps} steps")


def ids_of(deltas: list[Delta]) -> list[int]:
    return [token.id for delta in deltas for token in delta.tokens]


def alone(model: Transformer, request: Request, **config: object) -> list[int]:
    """What a request gets from an engine of its own, without tricks."""
    engine = Engine(model, TOKENIZER, EngineConfig(prefix_cache=False, **config))  # type: ignore[arg-type]
    ((_, deltas),) = run(engine, [request]).items()
    return ids_of(deltas)
