"""A text that is being generated: what it has so far, and what is left to compute of it."""

from collections.abc import Collection
from dataclasses import dataclass, field

from torch import Tensor

from moesaic.engine.prompt_lookup import PromptLookup
from moesaic.engine.request import Delta, FinishReason, Logprob, PromptReport, Request, Token, TokenRouting
from moesaic.engine.sampler import Sampler, logprob
from moesaic.engine.text import TextAssembly
from moesaic.errors import MoesaicError
from moesaic.tokenizer import Tokenizer


class Sequence:
    """One request on its way. `ids` are its prompt and what was generated; the first `num_computed` of them have keys
    and values in `blocks`."""

    def __init__(
        self, handle: int, request: Request, tokenizer: Tokenizer, eos_ids: Collection[int], most_tokens: int
    ) -> None:
        self.handle, self.request = handle, request
        self.ids = list(request.prompt_ids)
        self.num_prompt = len(self.ids)
        self.num_computed = 0
        self.blocks: list[int] = []
        self.num_remembered = 0
        """Of its blocks, those that the pool knows the content of."""
        self.drafts: list[int] = []
        """Guesses of what follows `ids`, which the next pass checks."""
        self.num_cached = 0
        """Tokens of the prompt that needed no computing."""
        self.num_counted = 0
        """Of the prompt, those that the statistics have."""
        self.finish_reason: FinishReason | None = None
        self.sampler = Sampler(request.sampling, request.prompt_ids, eos_ids)
        self.lookup: PromptLookup | None = None
        stops = request.sampling.stop
        # Special tokens are no text, but programs name them as stop strings.
        named = [token_id for token_id in map(tokenizer.special_id, stops) if token_id is not None]
        before = () if request.new_message else self.ids
        self._text = TextAssembly(tokenizer, stops, {*request.visible_ids, *named}, before)
        self._eos_ids = frozenset() if request.sampling.ignore_eos else frozenset(eos_ids)
        self._most_tokens = most_tokens
        self._delta = _Gathered()
        self._prompt_logprobs: list[Logprob | None] = [None]
        self._prompt_routing: list[TokenRouting] = []
        self._told_prompt = False

    @property
    def num_new(self) -> int:
        """Tokens without keys and values, drafts left out."""
        return len(self.ids) - self.num_computed

    @property
    def is_decoding(self) -> bool:
        return len(self.ids) > self.num_prompt and self.num_new == 1

    @property
    def num_generated(self) -> int:
        return len(self.ids) - self.num_prompt

    @property
    def is_plain_greedy(self) -> bool:
        """Whether its next token is that of the highest logit."""
        return self.sampler.is_plain_greedy and self.request.constraint is None

    @property
    def may_reuse_beginning(self) -> bool:
        """What is asked about the tokens of the prompt is known only of those that are computed."""
        told = self.request.routed_experts and self.request.routed_from < self.num_prompt - 1
        return self.request.prompt_logprobs is None and not told

    def next_ids(self, count: int) -> list[int]:
        """The first `count` tokens without keys and values, drafts included."""
        known = self.ids[self.num_computed : self.num_computed + count]
        return known + self.drafts[: count - len(known)]

    def start_over(self) -> None:
        """Without keys and values; what was generated is kept."""
        self.blocks, self.num_computed, self.num_remembered, self.drafts = [], 0, 0, []
        self._prompt_logprobs, self._prompt_routing = [None], []

    def take(self, token_id: int, logits: Tensor, routing: TokenRouting | None) -> None:
        """The next token, drawn from logits (V,); may end the text."""
        request, count = self.request, self.num_generated + 1
        known = None if request.logprobs is None else logprob(logits, token_id, request.logprobs)
        self.ids.append(token_id)
        self.sampler.accept(token_id)
        if token_id in self._eos_ids:
            self.finish_reason = "stop"
            return
        self._delta.tokens.append(Token(token_id, known, routing))
        self._delta.text += self._text.push(token_id)
        constraint = request.constraint
        if constraint is not None:
            constraint.accept(token_id)
        if self._text.stopped or (constraint is not None and constraint.finished):
            self.finish_reason = "stop"
        elif count == request.sampling.max_tokens or len(self.ids) == self._most_tokens:
            self.finish_reason = "length"

    def tell_prompt(self, logprobs: list[Logprob], routing: list[TokenRouting]) -> None:
        """What was asked about tokens of the prompt, a part at a time. A text that starts over tells it only once."""
        if not self._told_prompt:
            self._prompt_logprobs += logprobs
            self._prompt_routing += routing

    def delta(self) -> Delta | None:
        """What came since the last call; None for nothing."""
        prompt = None
        if self._delta.tokens or self.finish_reason:
            if self.finish_reason:
                self._delta.text += self._text.flush()
                if self._text.stopped:  # by what was held back
                    self.finish_reason = "stop"
            if not self._told_prompt:
                prompt, self._told_prompt = self._report(), True
        gathered, self._delta = self._delta, _Gathered()
        if not (gathered.tokens or self.finish_reason):
            return None
        return Delta(gathered.text, tuple(gathered.tokens), self._text.take_told(), prompt, self.finish_reason)

    def failure(self, error: MoesaicError) -> Delta:
        self.finish_reason = "error"
        return Delta(finish_reason="error", error=error)

    def _report(self) -> PromptReport:
        request = self.request
        return PromptReport(
            num_tokens=self.num_prompt,
            cached_tokens=self.num_cached,
            logprobs=None if request.prompt_logprobs is None else self._prompt_logprobs[: self.num_prompt],
            routing=self._prompt_routing if request.routed_experts else None,
        )


@dataclass
class _Gathered:
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
