"""Texts as rows of tokens, and a model run over them while its routing is written down.

B sequences, L tokens of each, T tokens of all.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields

import numpy as np
import torch
from torch import Tensor

from moesaic.analysis.record import watch_routing
from moesaic.analysis.trace_writer import TokenRows, TraceWriter
from moesaic.errors import UsageError
from moesaic.model.transformer import Transformer
from moesaic.ops import Routing
from moesaic.residency.residency import residency_of


def text_rows(
    sources: Sequence[Iterable[np.ndarray]], token_bytes: Sequence[int], *, sequence_length: int, limit: int
) -> TokenRows:
    """The first `limit` tokens of each source, cut into sequences that see nothing before them.

    Args:
        sources: documents of token ids, each (n,); they are read no further than needed.
        token_bytes: of each id, the bytes of text that it stands for.
    """
    sizes_V = np.array(token_bytes)
    parts, num_documents, num_sequences = [], 0, 0
    for source, documents in enumerate(sources):
        ids, document_ids = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        room = limit
        for document in documents:
            taken = document[:room].astype(np.int64)
            if len(taken):
                ids.append(taken)
                document_ids.append(np.full(len(taken), num_documents))
                num_documents += 1
            room -= len(taken)
            if room == 0:
                break
        ids_T = np.concatenate(ids)
        places_T = np.arange(len(ids_T))
        sizes_T = sizes_V[ids_T]
        parts.append(
            TokenRows(
                token_ids=ids_T,
                source_ids=np.full(len(ids_T), source),
                document_ids=np.concatenate(document_ids),
                sequence_ids=num_sequences + places_T // sequence_length,
                positions=places_T % sequence_length,
                text_offsets=np.cumsum(sizes_T) - sizes_T,
            )
        )
        num_sequences += -(-len(ids_T) // sequence_length)
    return TokenRows(**{
        field.name: np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(TokenRows)
    })  # fmt: skip


@torch.no_grad()
def record_text(
    model: Transformer,
    text: TokenRows,
    writer: TraceWriter,
    *,
    batch_size: int = 8,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Runs the model over all of the text, in order, and hands its routing to the writer. A budget of memory is kept.

    Raises:
        UsageError: the text is no whole sequences one after another (a trace of generated text), or there is no room.
    """
    device = model.embed_tokens.weight.device
    residency = residency_of(model)
    for low, high, length in _batches(text, batch_size):
        rows = text[low:high]
        tokens_BL = torch.from_numpy(rows.token_ids.reshape(-1, length).astype(np.int64)).to(device)
        routings: list[Routing] = []
        room = None if residency is None else residency.room(pass_tokens=tokens_BL.numel(), logits=len(tokens_BL))
        with room or nullcontext(), model.evaluating():
            model(tokens_BL, routings=routings, logits_to_keep=1)
        writer.add(rows, routings)
        progress(high)


@contextmanager
def record_passes(
    model: Transformer, writer: TraceWriter, token_bytes: Sequence[int], source: Callable[[], int | None]
) -> Iterator[None]:
    """Within it the writer gets the routing of each forward pass of whole sequences (B, L), as evaluation and training
    make them: each is a document of its own, and `text_offsets` go on from one to the next of a source.

    `source` says when a pass is done which source its tokens are of; None leaves them out.
    """
    sizes_V = np.array(token_bytes)
    offsets: dict[int, int] = {}
    num_sequences = 0

    def write(tokens_BL: Tensor, routings: list[Routing]) -> None:
        nonlocal num_sequences
        of = source()
        if of is None:
            return
        count, length = tokens_BL.shape
        ids_T = tokens_BL.flatten().cpu().numpy()
        sizes_T = sizes_V[ids_T]
        sequences_T = num_sequences + np.arange(count).repeat(length)
        ends_T = offsets.get(of, 0) + np.cumsum(sizes_T)
        writer.add(
            TokenRows(
                token_ids=ids_T,
                source_ids=np.full(len(ids_T), of),
                document_ids=sequences_T,
                sequence_ids=sequences_T,
                positions=np.tile(np.arange(length), count),
                text_offsets=ends_T - sizes_T,
            ),
            routings,
        )
        num_sequences, offsets[of] = num_sequences + count, int(ends_T[-1])

    with watch_routing(model, write):
        yield


def _batches(text: TokenRows, batch_size: int) -> Iterator[tuple[int, int, int]]:
    """First token, end and sequence length of stretches of up to `batch_size` sequences of one length."""
    starts = np.flatnonzero(np.diff(text.sequence_ids, prepend=-1))
    lengths = np.diff(np.append(starts, len(text)))
    if not np.array_equal(text.positions, np.arange(len(text)) - np.repeat(starts, lengths)):
        raise UsageError("the trace is not of whole texts, which another model could read; compare it with a trace")
    first = 0
    while first < len(starts):
        last = first + 1
        while last < len(starts) and last - first < batch_size and lengths[last] == lengths[first]:
            last += 1
        low = int(starts[first])
        yield low, low + int(lengths[first]) * (last - first), int(lengths[first])
        first = last
