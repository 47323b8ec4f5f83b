"""One text at a time: on the engine, or, where later tokens change what earlier ones get, from the whole text anew.

L prompt tokens, V vocabulary.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch

from moesaic.config import EngineConfig, SamplingConfig
from moesaic.engine.engine import Engine, end_ids, is_servable
from moesaic.engine.request import Request
from moesaic.engine.sampler import Sampler
from moesaic.engine.text import TextAssembly
from moesaic.errors import UsageError
from moesaic.model.kv_cache import KVCache
from moesaic.model.paged_kv import kv_block_bytes
from moesaic.model.transformer import Transformer
from moesaic.ops.native_step import BLOCK_TOKENS
from moesaic.tokenizer import Tokenizer

_STEP_TOKENS = 2048
"""Nobody waits for a step but the text itself."""


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


def stream(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt_ids: list[int],
    config: SamplingConfig,
    generation: Generation,
    engine: Engine | None = None,
    *,
    new_message: bool = False,
    make_engine: Callable[[Transformer, Tokenizer, EngineConfig], Engine] = Engine,
) -> Iterator[str]:
    """Yield text as it is decoded, until an end-of-sequence token, a stop string or `max_tokens`; statistics go to
    `generation`. An `engine` of this model, with nothing else to do, may know the beginning already; without one
    `make_engine` makes it. The text goes on with the prompt's, a space at its beginning included, unless it is a
    `new_message`.

    Raises:
        UsageError: the prompt is empty, it and max_tokens exceed the model's positions, or the routers look at later
            tokens and `config.allow_lookahead` is not set.
    """
    require_causal(model, config)
    _require_room(model, len(prompt_ids), config.max_tokens)
    generation.prompt_tokens = len(prompt_ids)
    with ExitStack() as stack:
        stack.enter_context(model.evaluating())
        if not is_servable(model):
            text = TextAssembly(tokenizer, config.stop, after=() if new_message else prompt_ids)
            texts = _from_whole_texts(model, tokenizer, prompt_ids, config, text, generation)
        else:
            if engine is None:
                longest = len(prompt_ids) + config.max_tokens
                engine = make_engine(model, tokenizer, _for_one_text(model, len(prompt_ids), longest))
                stack.callback(engine.close)
            request = Request(prompt_ids=prompt_ids, sampling=config, new_message=new_message)
            texts = _from_engine(engine, request, generation)
        for piece in texts:
            generation.text += piece
            yield piece


def _from_engine(engine: Engine, request: Request, generation: Generation) -> Iterator[str]:
    handle = engine.submit(request)
    try:
        while engine.has_work:
            start = time.perf_counter()
            deltas = engine.step()
            seconds = time.perf_counter() - start
            if generation.token_ids:
                generation.decode_seconds += seconds
            else:
                generation.prefill_seconds += seconds
            for _, delta in deltas:
                if delta.error is not None:
                    raise delta.error
                generation.token_ids += [token.id for token in delta.tokens]
                yield delta.text
    except BaseException:
        engine.cancel(handle)
        raise


def _for_one_text(model: Transformer, prompt_tokens: int, longest: int) -> EngineConfig:
    """With no more memory than it needs."""
    weight = model.embed_tokens.weight
    kv_bytes = -(-longest // BLOCK_TOKENS) * kv_block_bytes(model.config, weight.dtype, weight.device)
    return EngineConfig(
        max_sequences=1,
        step_tokens=min(prompt_tokens, _STEP_TOKENS),
        kv_memory=str(kv_bytes),
        max_model_tokens=longest,
        prefix_cache=False,
    )


@torch.inference_mode()
def _from_whole_texts(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt_ids: list[int],
    config: SamplingConfig,
    text: TextAssembly,
    generation: Generation,
) -> Iterator[str]:
    """For models that the engine does not serve."""
    next_logits = _Continuation(model, capacity=len(prompt_ids) + config.max_tokens)
    ends = set() if config.ignore_eos else end_ids(model, tokenizer)
    sampler = Sampler(config, prompt_ids)
    new_ids = prompt_ids
    while len(generation.token_ids) < config.max_tokens and not text.stopped:
        start = time.perf_counter()
        token_id = sampler.draw(next_logits.after(new_ids), len(generation.token_ids))
        seconds = time.perf_counter() - start
        if new_ids is prompt_ids:
            generation.prefill_seconds = seconds
        else:
            generation.decode_seconds += seconds
        if token_id in ends:
            break
        sampler.accept(token_id)
        generation.token_ids.append(token_id)
        new_ids = [token_id]
        yield text.push(token_id)
    yield text.flush()


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

    def after(self, new_ids: list[int]) -> torch.Tensor:
        """(V,) after the text so far and `new_ids`."""
        self._ids += new_ids
        ids = self._ids if self._kv is None else new_ids
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
