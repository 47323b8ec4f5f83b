"""EleutherAI's lm-evaluation-harness on the engine, without a server in between.

    lm_eval.simple_evaluate(model=MoesaicLM(model, tokenizer), tasks=["hellaswag"])

Importing this module raises UsageError where the harness is not installed.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

from moesaic.config import EngineConfig, SamplingConfig
from moesaic.engine.engine import Engine, end_ids
from moesaic.engine.request import Delta, Logprob, OverloadedError, PromptReport, Request
from moesaic.errors import UsageError
from moesaic.model.transformer import Transformer
from moesaic.tokenizer import Tokenizer

try:
    from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
    from lm_eval.models.utils import normalize_gen_kwargs  # pyright: ignore[reportMissingImports]
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window  # pyright: ignore[reportMissingImports]
    from tqdm import tqdm
except ModuleNotFoundError as error:
    raise UsageError(f"evaluating needs {error.name}; install it: pip install lm_eval") from None

_SCORING = SamplingConfig(max_tokens=1, temperature=0.0, ignore_eos=True)
"""The engine writes at least one token; it is not looked at."""
_SAMPLING_FIELDS = {
    "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
    "ignore_eos", "seed",
}  # fmt: skip
_MAX_NEW_TOKENS = 256
"""Of tasks that do not say how long an answer may be, as in the harness's own models."""
_SEED = 1234
"""That of the harness's clients of servers, so that both draw the same answers."""

Scored = tuple[Any, list[int], list[int]]
"""What to cache the score under, the ids before, and the ids to be scored."""


class MoesaicLM(TemplateLM):
    """A model under evaluation. All requests of a task are computed side by side, as far as `config` has room.

    Texts longer than the model takes lose their beginning. `add_bos_token` puts the tokenizer's first token before each
    text; None does what the tokenizer would do by itself. Names of special tokens in a text become these tokens, since
    chat templates write them.

    Raises UsageError for models that the engine does not serve, and where neither a first nor a last token is known.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        config: EngineConfig | None = None,
        *,
        add_bos_token: bool | None = None,
    ) -> None:
        super().__init__()
        self._tokens, self._template_name = tokenizer, tokenizer.fingerprint
        self._first_ids = _first_ids(tokenizer, add_bos_token)
        ends = sorted(end_ids(model, tokenizer))
        known = [token_id for token_id in (tokenizer.eos_id, *ends) if token_id is not None]
        if not known and tokenizer.bos_id is None:
            raise UsageError(
                "neither the model nor its tokenizer names a token that begins or ends a text, which stands before "
                "texts without a context; set eos_token in tokenizer_config.json"
            )
        self._eot_id = known[0] if known else cast(int, tokenizer.bos_id)
        self._engine = Engine(model, tokenizer, config)
        self.max_length = self._engine.max_model_tokens - 1
        """Tokens that can be scored together; the engine keeps room for one more."""
        if self.max_length < 3:
            self._engine.close()
            raise UsageError(f"texts of at most {self._engine.max_model_tokens} tokens are served; 4 are needed here")

    def close(self) -> None:
        """Gives back what the engine has of a budget of memory."""
        self._engine.close()

    @property
    def eot_token_id(self) -> int:
        return self._eot_id

    @property
    def prefix_token_id(self) -> int:
        return self._eot_id if self._tokens.bos_id is None else self._tokens.bos_id

    @property
    def tokenizer_name(self) -> str:
        return self._template_name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        ids = self._tokens.encode(string, parse_special_tokens=True)
        first = self._first_ids if add_special_tokens is None else []
        return ids if ids[: len(first)] == first else first + ids

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Its source, which goes into the results."""
        return self._tokens.tool_template if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """As a text that the assistant's answer follows, or that the last message's own continuation follows."""
        text = self._tokens.apply_chat_template(chat_history, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"]
        start = text.rfind(last.strip())
        if start < 0:
            raise UsageError("this chat template changes the last message, so that it cannot be continued")
        return text[:start] + last.lstrip()

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        scored: list[Scored] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            for context_ids, ids in map(make_disjoint_window, windows):
                scored.append((None, context_ids, ids))
                owners.append(owner)
        parts: list[list[float]] = [[] for _ in requests]
        scores = self._loglikelihood_tokens(scored, disable_tqdm=disable_tqdm)
        for owner, (value, _) in zip(owners, scores, strict=True):
            parts[owner].append(value)
        values = [math.fsum(part) for part in parts]
        for request, value in zip(requests, values, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, value)
        return values

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], disable_tqdm: bool = False, **options: Any
    ) -> list[tuple[float, bool]]:
        """The log-probability of each continuation, and whether each of its tokens was the most likely one."""
        asked = [
            Request(prompt_ids=(before + ids)[-self.max_length :], sampling=_SCORING, prompt_logprobs=1)
            for _, before, ids in requests
        ]
        scores = [(0.0, True)] * len(requests)
        for index, _, prompt in self._answers(asked, disable_tqdm):
            key, _, ids = requests[index]
            assert prompt is not None
            assert prompt.logprobs is not None
            known = [logprob for logprob in prompt.logprobs[-len(ids) :] if logprob is not None] if ids else []
            scores[index] = _score(known)
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, scores[index])
        return scores

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        asked, times = [], Counter[str]()
        for context, options in (request.args for request in requests):
            times[f"{context}{options}"] += 1
            request = self._generation(context, options)
            sampling = request.sampling
            # The same question once more is asked for another answer.
            seed = sampling.seed + times[f"{context}{options}"] - 1
            asked.append(replace(request, sampling=replace(sampling, seed=seed)))
        texts = [""] * len(asked)
        for index, text, _ in self._answers(asked, disable_tqdm):
            texts[index] = text
            self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return texts

    def _generation(self, context: str, options: dict[str, Any]) -> Request:
        known = cast(dict[str, Any], normalize_gen_kwargs(options, default_max_gen_toks=_MAX_NEW_TOKENS))
        max_tokens: int = known.pop("max_gen_toks")
        until: list[str] = known.pop("until")
        known.pop("do_sample")
        unknown = sorted(known.keys() - _SAMPLING_FIELDS)
        if unknown:
            raise UsageError(f"generation_kwargs has {unknown[0]}; known are {', '.join(sorted(_SAMPLING_FIELDS))}")
        room = self.max_length - max_tokens
        if room < 1:
            raise UsageError(
                f"max_gen_toks is {max_tokens}, and this model takes {self.max_length} tokens for prompt and answer "
                f"together; lower it below {self.max_length}"
            )
        defaults = {"temperature": 0.0, "seed": _SEED}
        stop = tuple(text for text in until if text)
        sampling = SamplingConfig(**defaults | known, max_tokens=max_tokens, stop=stop)
        ids = self.tok_encode(context)[-room:] or [self.prefix_token_id]
        return Request(prompt_ids=ids, sampling=sampling)

    def _answers(
        self, requests: Sequence[Request], disable_tqdm: bool
    ) -> Iterator[tuple[int, str, PromptReport | None]]:
        """Number, text and prompt of each request as it ends. Raises what the first one that fails failed of."""
        engine, running = self._engine, dict[int, _Answer]()
        waiting = iter(enumerate(requests))
        following = next(waiting, None)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="texts") as bar:
            try:
                while following is not None or running:
                    # As many again wait, so that no step has a free place.
                    while following is not None and len(running) < 2 * engine.config.max_sequences:
                        try:
                            handle = engine.submit(following[1])
                        except OverloadedError:
                            if not running:
                                raise
                            break
                        running[handle] = _Answer(following[0])
                        following = next(waiting, None)
                    for handle, delta in engine.step():
                        answer = running[handle]
                        answer.take(delta)
                        if delta.finish_reason is not None:
                            del running[handle]
                            bar.update()
                            yield answer.index, answer.text, answer.prompt
            finally:
                for handle in running:
                    engine.cancel(handle)


class _Answer:
    """What came of one request so far."""

    def __init__(self, index: int) -> None:
        self.index, self.text = index, ""
        self.prompt: PromptReport | None = None

    def take(self, delta: Delta) -> None:
        if delta.error is not None:
            raise delta.error
        self.text += delta.text
        self.prompt = delta.prompt or self.prompt


def _score(logprobs: Sequence[Logprob]) -> tuple[float, bool]:
    is_greedy = all(logprob.value == logprob.top[0][1] for logprob in logprobs)
    return math.fsum(logprob.value for logprob in logprobs), is_greedy


def _first_ids(tokenizer: Tokenizer, add_bos_token: bool | None) -> list[int]:
    """What stands before each text."""
    if tokenizer.bos_id is None:
        if add_bos_token:
            raise UsageError("add_bos_token is set, but the tokenizer has no bos_token; leave it out")
        return []
    if add_bos_token is None:
        add_bos_token = tokenizer.encode("", add_special_tokens=True)[:1] == [tokenizer.bos_id]
    return [tokenizer.bos_id] if add_bos_token else []
