"""One sequence at a time: prefill the prompt, then decode token by token.

L prompt tokens, V vocabulary.
"""

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch

from moesaic.config import SamplingConfig
from moesaic.engine.sampler import Sampler
from moesaic.errors import UsageError
from moesaic.model.kv_cache import KVCache
from moesaic.model.transformer import Transformer
from moesaic.residency.residency import PREFILL_TOKENS, Room, residency_of
from moesaic.tokenizer import Tokenizer


@dataclass
class Generation:
    """What came out, and how fast. Filled while `stream` runs."""

    prompt_tokens: int
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.prompt_tokens / max(self.prefill_seconds, 1e-9)

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Of the tokens after the first, which prefill pays for; None when there are none."""
        decoded = len(self.token_ids) - 1
        return decoded / self.decode_seconds if decoded > 0 else None


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_tokens: int = 128,
    temperature: float = 0.8,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    allow_lookahead: bool = False,
) -> str:
    """The continuation of `prompt`, without the prompt itself.

    Raises UsageError for a model whose routers look at later tokens, unless `allow_lookahead`.
    """
    config = SamplingConfig(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        allow_lookahead=allow_lookahead,
    )
    generation = Generation(prompt_tokens=0)
    for _ in stream(model, tokenizer, tokenizer.encode(prompt, add_special_tokens=True), config, generation):
        pass
    return generation.text


@torch.inference_mode()
def stream(
    model: Transformer, tokenizer: Tokenizer, prompt_ids: list[int], config: SamplingConfig, generation: Generation
) -> Iterator[str]:
    """Yield text as it is decoded, until an end-of-sequence token or `max_tokens`; statistics go to `generation`.

    Raises:
        UsageError: the prompt is empty, it and max_tokens exceed the model's positions, or the routers look at later
            tokens and `config.allow_lookahead` is not set.
    """
    require_causal(model, config)
    _require_room(model, len(prompt_ids), config.max_tokens)
    capacity = len(prompt_ids) + config.max_tokens
    residency = residency_of(model)
    sizes = {"cached_tokens": capacity, "pass_tokens": min(len(prompt_ids), PREFILL_TOKENS)}
    with nullcontext() if residency is None else residency.room(**sizes) as room:
        yield from _stream(model, tokenizer, prompt_ids, config, generation, room)


def _stream(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt_ids: list[int],
    config: SamplingConfig,
    generation: Generation,
    room: Room | None,
) -> Iterator[str]:
    next_logits = _Continuation(model, capacity=len(prompt_ids) + config.max_tokens)
    generation.prompt_tokens = len(prompt_ids)
    sampler, decoder = Sampler(config), tokenizer.decoder()
    end_ids = set(model.config.eos_token_ids) or {tokenizer.eos_id}

    start = time.perf_counter()
    token_id = sampler.draw(next_logits.after(prompt_ids))
    generation.prefill_seconds = time.perf_counter() - start

    if room is not None:
        room.only_decodes()
    while token_id not in end_ids:
        generation.token_ids.append(token_id)
        piece = decoder.push(token_id)
        generation.text += piece
        yield piece
        if len(generation.token_ids) == config.max_tokens:
            break
        start = time.perf_counter()
        token_id = sampler.draw(next_logits.after([token_id]))
        generation.decode_seconds += time.perf_counter() - start
    rest = decoder.flush()
    generation.text += rest
    yield rest


class _Continuation:
    """The logits that follow a growing text. Keys and values are cached; where routers look at later tokens, what an
    earlier token gets may change with each new one, and the whole text is computed anew."""

    def __init__(self, model: Transformer, capacity: int) -> None:
        weight = model.embed_tokens.weight
        self._model, self._device = model, weight.device
        self._kv = None
        if not model.config.looks_ahead:
            self._kv = KVCache(
                model.config, batch_size=1, capacity=capacity, dtype=weight.dtype, device=weight.device
            )  # fmt: skip
        self._ids: list[int] = []
        self._most_tokens = capacity if residency_of(model) is None else PREFILL_TOKENS

    def after(self, new_ids: list[int]) -> torch.Tensor:
        """(V,) after the text so far and `new_ids`."""
        self._ids += new_ids
        if self._kv is None:
            return self._logits_after(self._ids)
        *pieces, last = (new_ids[i : i + self._most_tokens] for i in range(0, len(new_ids), self._most_tokens))
        for piece in pieces:
            self._logits_after(piece)
        return self._logits_after(last)

    def _logits_after(self, ids: list[int]) -> torch.Tensor:
        with self._model.evaluating():
            return self._model(torch.tensor([ids], device=self._device), kv=self._kv, logits_to_keep=1)[0, -1]


def require_causal(model: Transformer, config: SamplingConfig) -> None:
    """Raises UsageError where routers look at later tokens, unless the config allows it."""
    if model.config.looks_ahead and not config.allow_lookahead:
        assert model.config.moe is not None
        raise UsageError(
            f"with the router {model.config.moe.router} the experts of a token depend on later tokens, which are not "
            "known here: such a model saw the future in training, and its text is worse than its loss says. "
            "--allow-lookahead (allow_lookahead=True) generates anyway"
        )


def _require_room(model: Transformer, prompt_tokens: int, max_tokens: int) -> None:
    positions = model.config.max_position_embeddings
    if prompt_tokens == 0:
        raise UsageError("the prompt is empty; give at least one token of text")
    if prompt_tokens + max_tokens > positions:
        room = positions - prompt_tokens
        fix = f"lower --max-tokens to {room}" if room > 0 else "shorten the prompt"
        raise UsageError(
            f"the prompt has {prompt_tokens} tokens and --max-tokens is {max_tokens}, but the model has "
            f"{positions} positions; {fix}"
        )
