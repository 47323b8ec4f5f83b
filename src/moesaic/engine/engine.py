"""Many texts from one model: each step schedules, runs the model once, and draws the next tokens.

T tokens of a step side by side, R rows of logits, V vocabulary, K experts per token.
"""

import logging
import time
from collections import deque
from collections.abc import Iterable
from contextlib import ExitStack
from itertools import count
from threading import Lock

import torch
from torch import Tensor

from moesaic.config import EngineConfig
from moesaic.engine.block_pool import BlockPool
from moesaic.engine.capacity import ExpertTraffic, StepRoom, blocks_for
from moesaic.engine.prompt_lookup import DraftJudge, PromptLookup
from moesaic.engine.request import Delta, EngineStatistics, OverloadedError, Request
from moesaic.engine.routing_log import RoutingLog
from moesaic.engine.sampler import greedy_batch, logprobs
from moesaic.engine.scheduler import Scheduler, Share
from moesaic.engine.sequence import Sequence
from moesaic.errors import MoesaicError, UsageError
from moesaic.model.paged_kv import NewTokens, PagedKV
from moesaic.model.rope_scaling import BY_LENGTH
from moesaic.model.transformer import Transformer
from moesaic.ops import Routing
from moesaic.ops.native_step import BLOCK_TOKENS
from moesaic.residency.residency import PREFILL_TOKENS, residency_of
from moesaic.tokenizer import Tokenizer

_LOG = logging.getLogger(__name__)
_FAILING_AFTER = 8
"""Failed passes in a row; then it is not the texts that are at fault."""


class Engine:
    """Generates texts side by side. `submit` and `cancel` may be called from any thread, `step` from one alone.

    Raises UsageError for models whose routers look at later tokens, or whose tokens pass by layers, and where memory is
    too little.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, config: EngineConfig | None = None) -> None:
        _require_servable(model)
        self.config = config = config or EngineConfig()
        self.model, self.tokenizer = model, tokenizer
        weight = model.embed_tokens.weight
        num_blocks = blocks_for(model, config)
        step_tokens = config.step_tokens if residency_of(model) is None else min(config.step_tokens, PREFILL_TOKENS)
        self._kv = PagedKV(model.config, num_blocks, weight.dtype, weight.device)
        self.max_model_tokens = min(
            config.max_model_tokens, model.config.max_position_embeddings, num_blocks * BLOCK_TOKENS
        )
        self.scheduler = Scheduler(
            BlockPool(num_blocks, keeps_beginnings=config.prefix_cache and not _stretches(model)),
            config.max_sequences,
            step_tokens,
        )
        self._eos_ids = end_ids(model, tokenizer)
        self._closing = ExitStack()
        self._room = self._closing.enter_context(StepRoom(model, self._kv, config).opened())
        self._traffic = ExpertTraffic(model, config)
        self._judge = DraftJudge()
        self._routing = RoutingLog(model)
        self._statistics = EngineStatistics(kv_blocks=num_blocks)
        self._handles, self._lock = count(1), Lock()
        self._arrived: deque[Sequence] = deque()
        self._unwanted: set[int] = set()
        self._failed_passes = 0
        """For reasons that nobody foresaw, since the last one that did not."""

    def submit(self, request: Request) -> int:
        """Puts it into the queue; its handle, by which `step` tells what comes of it.

        Raises UsageError for a prompt that is empty, too long, or not of this vocabulary, and OverloadedError where the
        queue is full.
        """
        (handle,) = self.submit_all([request])
        return handle

    def submit_all(self, requests: Iterable[Request]) -> list[int]:
        """`submit` of all, or of none.

        Raises UsageError also where there are more than would fit an empty queue.
        """
        arriving = [self._sequence(request) for request in requests]
        with self._lock:
            self._require_room(len(arriving))
            self._arrived += arriving
        return [sequence.handle for sequence in arriving]

    def require_room(self) -> None:
        """Raises OverloadedError where `submit` would, whatever the request."""
        with self._lock:
            self._require_room()

    def cancel(self, handle: int) -> None:
        """Nothing more comes of it, and its memory is free before the next step; unknown handles are ignored."""
        with self._lock:
            self._unwanted.add(handle)

    @property
    def is_failing(self) -> bool:
        """Whether nothing succeeds any more, for reasons that nobody foresaw; a pass that succeeds ends that."""
        return self._failed_passes >= _FAILING_AFTER

    @property
    def has_work(self) -> bool:
        return bool(self._arrived or self._unwanted or self.scheduler.running or self.scheduler.waiting)

    @torch.inference_mode()
    def step(self) -> list[tuple[int, Delta]]:
        """Advance some texts by some tokens; what is new of each, by its handle. An error ends the text that it belongs
        to, and no other."""
        start = time.perf_counter()
        with self._lock:
            self._take_arrivals()
            num_texts = len(self.scheduler.running)
            drafts = self.config.prompt_lookup > 0 and self._judge.wanted(num_texts)
            shares = self.scheduler.schedule(
                self._traffic.most_sequences(), lambda sequence: self._draft(sequence) if drafts else []
            )
        if not shares:
            return []
        drafted = any(share.sequence.drafts for share in shares)
        before = self._statistics.generated_tokens
        deltas = self._run(shares)
        generated = self._statistics.generated_tokens - before
        seconds = time.perf_counter() - start
        if all(share.sequence.num_generated > 1 for share in shares):  # no prompt was read
            self._judge.observe(seconds, generated, num_texts, drafted)
        self._statistics.steps += 1
        self._statistics.step_seconds += seconds
        return deltas

    def statistics(self) -> EngineStatistics:
        """A copy, from any thread."""
        return self._routing.described(
            self._statistics,
            running=len(self.scheduler.running),
            waiting=len(self.scheduler.waiting) + len(self._arrived),
            preemptions=self.scheduler.num_preempted,
            kv_blocks_used=self.scheduler.pool.num_used,
        )

    def close(self) -> None:
        """Gives back what it has of a budget of memory."""
        self._closing.close()

    def _sequence(self, request: Request) -> Sequence:
        self._check(request)
        sequence = Sequence(next(self._handles), request, self.tokenizer, self._eos_ids, self.max_model_tokens)
        if self.config.prompt_lookup:
            sequence.lookup = PromptLookup(self.config.prompt_lookup)
        return sequence

    def _check(self, request: Request) -> None:
        ids, vocab_size = request.prompt_ids, self.model.config.vocab_size
        if not ids:
            raise UsageError("the prompt is empty; give at least one token of text")
        if len(ids) >= self.max_model_tokens:
            raise UsageError(
                f"the prompt has {len(ids):,} tokens, and texts of at most {self.max_model_tokens:,} are served, the "
                "answer included; shorten it"
            )
        if not 0 <= min(ids) <= max(ids) < vocab_size:
            raise UsageError(f"token ids are {min(ids)} to {max(ids)}, and the model has 0 to {vocab_size - 1}")
        unknown = [token_id for token_id in request.sampling.logit_bias if not 0 <= token_id < vocab_size]
        if unknown:
            raise UsageError(f"logit_bias has token {unknown[0]}, and the model has 0 to {vocab_size - 1}")

    def _require_room(self, count: int = 1) -> None:
        config = self.config
        if count > config.max_sequences + config.max_waiting:
            raise UsageError(
                f"{count} texts are asked for at once, and {config.max_sequences + config.max_waiting} fit the server "
                f"when nobody waits; ask for fewer, or serve with --max-waiting {count - config.max_sequences}"
            )
        free = config.max_sequences - len(self.scheduler.running)
        before = [*self.scheduler.waiting, *self._arrived]
        waiting = before[max(free, 0) :]
        tokens = sum(sequence.num_prompt for sequence in waiting)
        would_wait = len(before) + count - max(free, 0)
        # Its own tokens do not count: a request with more than the limit could never come.
        full = free <= len(before) and tokens >= config.max_waiting_tokens
        if would_wait > config.max_waiting or full:
            more = f", and {count} more do not fit" if count > 1 else ""
            raise OverloadedError(
                f"{len(waiting)} requests with {tokens:,} tokens are waiting already{more}; ask again later",
                retry_after=self._seconds_until_room(tokens),
            )

    def _take_arrivals(self) -> None:
        self.scheduler.waiting.extend(self._arrived)
        self._arrived.clear()
        unwanted, self._unwanted = self._unwanted, set()
        if unwanted:
            for sequence in [*self.scheduler.running, *self.scheduler.waiting]:
                if sequence.handle in unwanted:
                    self._finish(sequence, "cancelled")

    def _finish(self, sequence: Sequence, reason: str) -> None:
        self.scheduler.remove(sequence)
        finished = self._statistics.finished
        finished[reason] = finished.get(reason, 0) + 1

    def _draft(self, sequence: Sequence) -> list[int]:
        """Guesses that fit: the text must have room for them."""
        if sequence.lookup is None:
            return []
        left = min(
            sequence.request.sampling.max_tokens - sequence.num_generated, self.max_model_tokens - len(sequence.ids)
        )
        return sequence.lookup.draft(sequence.ids)[: max(left - 1, 0)]

    def _run(self, shares: list[Share]) -> list[tuple[int, Delta]]:
        """One pass over the tokens of all shares; where it fails each runs alone, so that only those at fault end."""
        try:
            logits_RV, routings = self._forward(shares)
        except Exception as error:
            if len(shares) > 1:
                return [delta for share in shares for delta in self._run([share])]
            self._failed_passes += not isinstance(error, MoesaicError)
            sequence = shares[0].sequence
            self._finish(sequence, "error")
            return [(sequence.handle, sequence.failure(_as_moesaic_error(error)))]
        self._failed_passes = 0
        greedy = self._greedy(shares, logits_RV)
        deltas, row, token = [], 0, 0
        for share in shares:
            rows = share.logit_rows
            logits = logits_RV[row : row + len(rows)]
            try:
                self._take(share, logits, greedy[row : row + len(rows)], RoutingLog.part(routings, token))
                delta = share.sequence.delta()
            except Exception as error:
                delta = share.sequence.failure(_as_moesaic_error(error))
            if share.sequence.finish_reason is not None:
                self._finish(share.sequence, share.sequence.finish_reason)
            if delta is not None:
                deltas.append((share.sequence.handle, delta))
            row, token = row + len(rows), token + share.count
        return deltas

    def _forward(self, shares: list[Share]) -> tuple[Tensor, list[Routing]]:
        """Logits (R, V) of the rows that are asked for, and the routing of all T tokens, by layer."""
        self._room.make(sum(share.count for share in shares))
        ids, rows, sequences = [], [], []
        for share in shares:
            sequence = share.sequence
            start = sequence.num_computed
            rows += [len(ids) + row for row in share.logit_rows]
            ids += sequence.next_ids(share.count)
            sequences.append(NewTokens(sequence.blocks, start, share.count, sequence.num_prompt))
        started, routings = time.perf_counter(), []
        device = self._kv.keys.device
        with self.model.evaluating():
            logits_1RV = self.model(
                torch.tensor([ids], device=device),
                kv=self._kv.batch(sequences),
                logits_to_keep=None if len(rows) == len(ids) else torch.tensor(rows, device=device, dtype=torch.int64),
                skip_others=not any(share.sequence.request.routed_experts for share in shares),
                routings=routings,
            )
        self._traffic.observe(len(shares), len(ids))
        self._routing.count(routings)
        self._statistics.model_seconds += time.perf_counter() - started
        return logits_1RV[0], routings

    def _greedy(self, shares: list[Share], logits: Tensor) -> list[int | None]:
        """The most likely token of each row (R,), where anybody takes that as it is."""
        of_rows = [share.sequence.is_plain_greedy for share in shares for _ in share.logit_rows]
        if not any(of_rows):
            return [None] * len(logits)
        ids = greedy_batch(logits)
        return [token_id if is_plain else None for token_id, is_plain in zip(ids, of_rows, strict=True)]

    def _take(self, share: Share, logits: Tensor, greedy: list[int | None], routing: RoutingLog.Part) -> None:
        """Note what a share told of its text, and draw what follows; logits (rows of the share, V)."""
        sequence = share.sequence
        self._tell_prompt(share, logits, routing)
        reaches_end = share.reaches_end
        self._count(share)
        self.scheduler.advance(share)
        if reaches_end:
            drawn = slice(-1 - len(sequence.drafts), None)
            self._draw(sequence, logits[drawn], greedy[drawn], routing, share.count - 1 - len(sequence.drafts))

    def _tell_prompt(self, share: Share, logits: Tensor, routing: RoutingLog.Part) -> None:
        """What was asked about the tokens of the prompt."""
        sequence, rows = share.sequence, share.prompt_rows
        request, known, routed = sequence.request, [], []
        if request.prompt_logprobs is not None and rows:
            next_ids = sequence.ids[sequence.num_computed + 1 : sequence.num_computed + 1 + rows]
            known = logprobs(logits[:rows], next_ids, request.prompt_logprobs)
        if request.routed_experts:
            first = max(0, request.routed_from - sequence.num_computed)
            routed = [routing.of_token(index) for index in range(first, rows)]
        sequence.tell_prompt(known, routed)

    def _draw(
        self, sequence: Sequence, logits: Tensor, greedy: list[int | None], routing: RoutingLog.Part, first: int
    ) -> None:
        """The next token, and those after it as far as drafts come true; logits (1 + drafts, V), of tokens from number
        `first` of the share on."""
        request, drafts = sequence.request, sequence.drafts
        for index, logits_V in enumerate(logits):
            token_id = greedy[index]
            if token_id is None:
                token_id = sequence.sampler.draw(logits_V, sequence.num_generated, request.constraint)
            sequence.take(token_id, logits_V, routing.of_token(first + index) if request.routed_experts else None)
            self._statistics.generated_tokens += 1
            if sequence.finish_reason is not None or index == len(drafts) or drafts[index] != token_id:
                break
            sequence.num_computed += 1  # the draft was this token, and was computed with it
        sequence.drafts = []

    def _count(self, share: Share) -> None:
        sequence, statistics = share.sequence, self._statistics
        if not sequence.num_counted:
            statistics.cached_tokens += sequence.num_cached
            sequence.num_counted = sequence.num_cached
        read = min(sequence.num_computed + share.count, sequence.num_prompt)
        if read > sequence.num_counted:  # a text that started over reads what was counted already
            statistics.prompt_tokens += read - sequence.num_counted
            sequence.num_counted = read

    def _seconds_until_room(self, waiting_tokens: int) -> float:
        """About, from how long steps took so far."""
        statistics = self._statistics
        done = statistics.prompt_tokens + statistics.generated_tokens
        return min(60.0, max(1.0, waiting_tokens * statistics.step_seconds / max(done, 1)))


def _stretches(model: Transformer) -> bool:
    """Whether keys depend on how long their text is, so that no other text can use them."""
    scaling = model.config.rope_scaling
    return scaling is not None and scaling.rope_type in BY_LENGTH


def _as_moesaic_error(error: Exception) -> MoesaicError:
    """What a client may read: of what nobody foresaw the log has more."""
    if isinstance(error, MoesaicError):
        return error
    _LOG.error("a text failed", exc_info=error)
    return MoesaicError(f"the engine failed on this text with {type(error).__name__}; the log says why")


def end_ids(model: Transformer, tokenizer: Tokenizer) -> set[int]:
    """Tokens that end a text."""
    known = set(model.config.eos_token_ids)
    return known if known or tokenizer.eos_id is None else {tokenizer.eos_id}


def is_servable(model: Transformer) -> bool:
    """Whether what a token gets is settled when it comes, in every layer."""
    return not model.config.looks_ahead and not model.config.depth_layers


def _require_servable(model: Transformer) -> None:
    if not is_servable(model):
        why = "tokens may pass by layers of this model (depth_layers)"
        if model.config.looks_ahead and model.config.moe is not None:
            why = f"the router {model.config.moe.router} looks at later tokens"
        raise UsageError(f"{why}, which texts that are written side by side do not have; use `moesaic generate`")
