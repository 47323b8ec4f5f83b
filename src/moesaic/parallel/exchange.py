"""All-to-all collectives that do not wait, and a count of the bytes that they send.

P ranks, R rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.parallel.transport import TRANSPORTS, Transport


@dataclass(frozen=True)
class Pending:
    """Rows that are under way to this rank."""

    works: Sequence[dist.Work]
    message: Tensor
    """What was sent: kept until all of it is away."""
    answer: Tensor
    transport: Transport
    dtype: torch.dtype

    def wait(self) -> Tensor:
        for work in self.works:
            work.wait()
        return self.transport.decode(self.answer, self.dtype)


class Exchange:
    """All-to-all over the ranks of a group; counts the bytes that leave this rank."""

    def __init__(self, group: dist.ProcessGroup, transport: str = "exact", gradient_transport: str = "exact") -> None:
        """Rows travel by `transport` in the forward pass and by `gradient_transport` in the backward pass."""
        self.group = group
        self.num_ranks = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.forward_transport = TRANSPORTS[transport]
        self.backward_transport = TRANSPORTS[gradient_transport]
        self.bytes_sent = 0
        self.unawaited: list[Pending] = []
        """Of the forward pass."""
        self.receives_first = dist.get_backend(group) == "gloo"
        """Its own all-to-all asks for rows after it began to send: what a late rank asks is behind all that it sends,
        and the two directions of a link take turns."""

    def counts(self, sent: Tensor) -> Tensor:
        """(P, ...) int64, of which row p goes to rank p -> what the others sent here, in the same shape."""
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        self.bytes_sent += sent.nbytes // self.num_ranks * (self.num_ranks - 1)
        return received

    def wait_for_abandoned(self) -> None:
        """In the backward pass: a checkpointed block is computed again up to its last saved tensor, which may lie
        between the start of an exchange and its end. Its memory must stay until then."""
        for pending in self.unawaited:
            pending.wait()
        self.unawaited = []

    def start(
        self, rows: Tensor, sent: Sequence[int], received: Sequence[int], transport: Transport = TRANSPORTS["exact"]
    ) -> Pending:
        """Rows in the order of their ranks, so many to each; those that come from each rank can be waited for."""
        message = transport.encode(rows).contiguous()
        answer = message.new_empty(sum(received), message.shape[1])
        works = self._works(answer, message, list(received), list(sent))
        self.bytes_sent += (len(message) - sent[self.rank]) * message.shape[1] * message.itemsize
        return Pending(works, message, answer, transport, rows.dtype)

    def _works(self, answer: Tensor, message: Tensor, received: list[int], sent: list[int]) -> list[dist.Work]:
        if not self.receives_first:
            work = dist.all_to_all_single(answer, message, received, sent, group=self.group, async_op=True)
            assert work is not None
            return [work]
        answers, messages = answer.split(received), message.split(sent)
        answers[self.rank].copy_(messages[self.rank])
        others = [(self.rank + step) % self.num_ranks for step in range(1, self.num_ranks)]
        works = [
            dist.irecv(answers[rank], group=self.group, group_src=rank) for rank in reversed(others) if received[rank]
        ]
        works += [dist.isend(messages[rank], group=self.group, group_dst=rank) for rank in others if sent[rank]]
        return [work for work in works if work is not None]
