"""`--trace FOLDER` of several commands: the routing of what they run, in the form that `moesaic inspect` reads.

T tokens, K experts per token, R rows of logits, V vocabulary.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moesaic.analysis.text_rows import record_passes
from moesaic.analysis.trace_writer import TokenRows, TraceWriter, by_token, joined, require_place
from moesaic.config import EngineConfig
from moesaic.engine.engine import Engine, is_servable
from moesaic.engine.request import FinishReason, Request
from moesaic.engine.routing_log import RoutingLog
from moesaic.engine.scheduler import Share
from moesaic.engine.sequence import Sequence as Text
from moesaic.errors import UsageError
from moesaic.model.transformer import Transformer
from moesaic.ops import Routing
from moesaic.server.token_texts import TokenTexts
from moesaic.tokenizer import Tokenizer

_LOG = logging.getLogger(__name__)
MakeEngine = Callable[[Transformer, Tokenizer, EngineConfig | None], Engine]
PROMPT_AND_ANSWER = ("prompt", "answer")
"""Sources of texts that an engine writes."""


def writer_for(
    directory: Path,
    model: str,
    transformer: Transformer,
    tokenizer: Tokenizer,
    sources: Sequence[str],
    *,
    with_logits: bool = False,
) -> TraceWriter:
    """For the routing of a model, which is named in the trace.

    Raises UsageError for a dense model, and where something is that is no trace.
    """
    if not transformer.moe_layers:
        raise UsageError(
            f"{model} is dense: it has no layers of experts to look at; name a mixture-of-experts model, or make "
            f"one with: moesaic upcycle {model} OUT --num-experts 8 --top-k 2"
        )
    return TraceWriter(
        directory,
        num_experts=[layer.router.num_experts for layer in transformer.moe_layers],
        sources=sources,
        about={"model": model, "tokenizer": tokenizer.fingerprint},
        token_bytes=TokenTexts(tokenizer).bytes_of,
        with_logits=with_logits,
    )


@contextmanager
def recorded_passes(
    directory: Path | None,
    model: str,
    transformer: Transformer,
    tokenizer: Tokenizer,
    sources: Sequence[str],
    source: Callable[[], int | None] = lambda: 0,
) -> Iterator[None]:
    """With a directory the passes of the model within are a trace there when the block ends; `source` says of which
    source each is, like `record_passes`."""
    if directory is None:
        yield
        return
    with (
        writer_for(directory, model, transformer, tokenizer, sources) as writer,
        record_passes(transformer, writer, tokenizer.token_bytes(), source),
    ):
        yield


def training_watch(directory: Path, run: str) -> Callable[[Transformer, Tokenizer], AbstractContextManager[None]]:
    """For `run_training`: the routing of what a run trains on and is evaluated on.

    Raises UsageError where something is that is no trace.
    """
    require_place(directory)

    def watch(model: Transformer, tokenizer: Tokenizer) -> AbstractContextManager[None]:
        def source() -> int | None:
            if not model.training:
                return 1
            return 0 if torch.is_grad_enabled() else None  # a pass that only counts loads is made again to learn

        return recorded_passes(directory, run, model, tokenizer, ("training", "validation"), source)

    return watch


@contextmanager
def traced_engines(
    directory: Path | None, model: str, transformer: Transformer, tokenizer: Tokenizer
) -> Iterator[MakeEngine]:
    """Yields what makes engines; with a directory the texts that they write are a trace there when the block ends.

    Raises UsageError like `writer_for`, and for a model whose texts have no routing of their own.
    """
    if directory is None:
        yield Engine
        return
    writer = writer_for(directory, model, transformer, tokenizer, PROMPT_AND_ANSWER)
    if not is_servable(transformer):
        raise UsageError(
            f"the experts of a token of {model} change with later tokens, so that an answer has no routing of its own; "
            f"trace a text: moesaic inspect {model} --data FILE --trace {directory}"
        )
    made: list[TracedEngine] = []

    def make(transformer: Transformer, tokenizer: Tokenizer, config: EngineConfig | None) -> Engine:
        made.append(TracedEngine(transformer, tokenizer, config, writer))
        return made[-1]

    with writer:
        yield make
        for engine in made:
            if engine.failure is not None:
                raise engine.failure


class TracedEngine(Engine):
    """An engine whose texts go to a trace, each as a whole when it has ended: one sequence, and one document.

    A token is written when the model has read it, once: not a guess that did not come true, not what a text that gave
    way computes again, not a beginning that was known already, nor the last token of an answer, which nobody reads.
    Where the trace cannot be written any more the texts go on without, and `failure` says why.
    """

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, config: EngineConfig | None, writer: TraceWriter
    ) -> None:
        super().__init__(model, tokenizer, config)
        self.failure: OSError | None = None
        self._writer = writer
        sizes = tokenizer.token_bytes()
        self._sizes_V = np.array(sizes + [0] * (model.config.vocab_size - len(sizes)))
        self._known: dict[int, _Known] = {}
        """By handle, of texts that have not ended."""
        self._pass: list[tuple[Tensor, Tensor]] = []
        self._places: dict[int, int] = {}
        """The first token of each text in the newest pass."""
        self._num_texts = 0

    def close(self) -> None:
        for known in [*self._known.values()]:
            self._write(known)
        super().close()

    def _sequence(self, request: Request) -> Text:
        if not request.routed_experts:  # or the last layer would leave out tokens whose logits nobody needs
            request = replace(request, routed_experts=True, routed_from=len(request.prompt_ids))
        return super()._sequence(request)

    def _forward(self, shares: list[Share]) -> tuple[Tensor, list[Routing]]:
        logits, routings = super()._forward(shares)
        self._pass = [by_token(routing) for routing in routings]
        ends = np.cumsum([share.count for share in shares]).tolist()
        self._places = {share.sequence.handle: end - share.count for share, end in zip(shares, ends, strict=True)}
        return logits, routings

    def _take(self, share: Share, logits: Tensor, greedy: list[int | None], routing: RoutingLog.Part) -> None:
        text, before = share.sequence, share.sequence.num_computed
        super()._take(share, logits, greedy, routing)
        known = self._known.setdefault(text.handle, _Known(text, before, before))
        new = max(0, known.end - before)
        rows = slice(self._places[text.handle] + new, self._places[text.handle] + text.num_computed - before)
        if rows.start < rows.stop:
            known.end = text.num_computed
            known.parts.append([(ids_TK[rows], weights_TK[rows]) for ids_TK, weights_TK in self._pass])

    def _finish(self, sequence: Text, reason: FinishReason) -> None:
        super()._finish(sequence, reason)
        if sequence.handle in self._known:
            self._write(self._known[sequence.handle])

    def _write(self, known: "_Known") -> None:
        del self._known[known.text.handle]
        if self.failure is not None:
            return
        places_T = np.arange(known.start, known.end)
        ids_T = np.array(known.text.ids[: known.end])
        sizes_T = self._sizes_V[ids_T]
        number_T = np.full(len(places_T), self._num_texts)
        rows = TokenRows(
            token_ids=ids_T[places_T],
            source_ids=(places_T >= known.text.num_prompt).astype(np.int64),
            document_ids=number_T,
            sequence_ids=number_T,
            positions=places_T,
            text_offsets=(np.cumsum(sizes_T) - sizes_T)[places_T],
        )
        chosen = [
            (joined([ids_TK for ids_TK, _ in of_layer]), joined([weights_TK for _, weights_TK in of_layer]))
            for of_layer in zip(*known.parts, strict=True)
        ]
        try:
            self._writer.add_chosen(rows, chosen)
        except OSError as error:
            self.failure = error
            _LOG.error("the trace ends here: %s", error)
        self._num_texts += 1


@dataclass
class _Known:
    """The routing of a text's tokens number `start` to `end`."""

    text: Text
    start: int
    end: int
    parts: list[list[tuple[Tensor, Tensor]]] = field(default_factory=list)
    """Of each pass: for each layer expert ids and weights (T, K)."""
