"""Inference over ranks: the first one has all of a model but experts, which are shared out, and computes alone; the
others hold experts, and no more.

So the engine and all that uses a model are as in one process. Before each exchange the first rank says which layer it
is for. The others wait for that, and need to know nothing else: they bring no tokens, they compute those that come.

E experts, P ranks, R rows received, D hidden size.
"""

import json
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore

from moesaic.errors import MoesaicError, UsageError
from moesaic.model.dispatch import Trip
from moesaic.model.transformer import Transformer
from moesaic.ops import Routing
from moesaic.parallel.all_to_all import AllToAllDispatcher
from moesaic.parallel.exchange import Exchange
from moesaic.parallel.expert_parallel import expert_bounds

EXCHANGE_TIMEOUT = timedelta(minutes=5)
"""How long a rank may take for one layer of one pass."""
FOR_EVER = timedelta(days=365)
"""Nobody may ask anything for a night. Should the first rank end, its connections do, and so do the others at once."""
END = -1
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""By their numbers on the wire."""
_LOG = logging.getLogger(__name__)


class LostRankError(MoesaicError):
    """Ranks have gone or are out of step, and no pass can be computed any more."""


@dataclass(frozen=True)
class ExpertShare:
    """The part of rank `rank` of `count` in every layer's experts; the first rank has all else as well."""

    rank: int
    count: int

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def bounds(self, num_experts: int) -> tuple[int, int]:
        """Its experts: the first, and the one after the last."""
        bounds = expert_bounds(num_experts, self.count)
        return bounds[self.rank], bounds[self.rank + 1]

    def require(self, num_experts: int | None) -> None:
        """Raises UsageError unless every rank gets an expert; None is a model without any."""
        if num_experts is None:
            raise UsageError(f"there are {self.count} ranks, and the model has no experts; start it without torchrun")
        if self.count > num_experts:
            raise UsageError(
                f"there are {self.count} ranks, and a layer has {num_experts} experts; start at most as many: "
                f"torchrun --nproc-per-node {num_experts} -m moesaic"
            )


class Company:
    """The ranks of the process group, which share the experts of one model."""

    def __init__(self) -> None:
        self.share = ExpertShare(dist.get_rank(), dist.get_world_size())
        assert dist.group.WORLD is not None
        self._exchange = dist.group.WORLD
        ranks = list(range(self.share.count))
        control = dist.new_group(ranks, timeout=FOR_EVER, backend="gloo")
        assert isinstance(control, dist.ProcessGroup)
        self.control = control
        self._store = PrefixStore("moesaic/loading", dist.distributed_c10d._get_default_store())

    def agree(self, error: BaseException | None) -> int:
        """Whether all ranks have loaded their share; `error` is what kept this one from it. The exit status of the
        failure, or 0.

        On the first rank raises what happened to others, with their number.
        """
        code = getattr(error, "exit_code", MoesaicError.exit_code)
        outcome = None if error is None else {"code": code, "message": str(error) or type(error).__name__}
        self._store.set(f"rank {self.share.rank}", json.dumps(outcome))
        if not self.share.is_first:
            self._store.wait(["verdict"], FOR_EVER)
            return int(self._store.get("verdict"))
        if error is not None:
            self._store.set("verdict", str(code))
            return code
        for rank in range(1, self.share.count):
            self._store.wait([f"rank {rank}"], FOR_EVER)
            other = json.loads(self._store.get(f"rank {rank}"))
            if other is not None:
                self._store.set("verdict", str(other["code"]))
                kind = UsageError if other["code"] == UsageError.exit_code else MoesaicError
                raise kind(f"rank {rank}: {other['message']}")
        self._store.set("verdict", "0")
        return 0

    def dispatcher(self, num_experts: int) -> AllToAllDispatcher:
        """Of a layer; shared experts compute while rows travel."""
        return AllToAllDispatcher(Exchange(self._exchange), expert_bounds(num_experts, self.share.count), "shared")


class Leader:
    """The first rank's word to the others. One thread at a time computes with its model."""

    def __init__(self, company: Company) -> None:
        self.company = company
        self._is_within_layer = False
        self.failure: LostRankError | None = None

    def call(self, layer: int, x: Tensor, routing: Routing) -> None:
        """All ranks to a layer, for rows and weights of such types. Raises LostRankError."""
        if self._is_within_layer:
            self._fail("a pass was given up in the middle of an exchange")
        with self.exchanging():
            self._say(layer, DTYPES.index(x.dtype), DTYPES.index(routing.weights.dtype))
        self._is_within_layer = True

    def done(self) -> None:
        """With that layer."""
        self._is_within_layer = False

    def end(self) -> None:
        """The others go home. Where they are out of step it is this process's end that tells them."""
        if self.failure is None and not self._is_within_layer:
            with self.exchanging():
                self._say(END, 0, 0)

    @contextmanager
    def exchanging(self) -> Iterator[None]:
        """Raises LostRankError where an exchange fails, and ever after."""
        if self.failure is not None:
            raise self.failure
        try:
            yield
        except RuntimeError as error:
            _LOG.error("an exchange with other ranks has failed: %s", str(error).partition(". This is")[0])
            self._fail("a rank that holds experts does not answer any more")

    def _fail(self, what: str) -> None:
        self.failure = LostRankError(f"{what}; start all ranks again, as torchrun does with --max-restarts 3")
        raise self.failure from None

    def _say(self, *numbers: int) -> None:
        dist.broadcast(torch.tensor(numbers), 0, group=self.company.control)


class LeadingDispatcher:
    """Of a layer on the first rank: calls the others to an exchange before it takes part in it."""

    def __init__(self, leader: Leader, layer: int, inner: AllToAllDispatcher) -> None:
        self.leader, self.inner = leader, inner
        self.overlaps_shared = inner.overlaps_shared
        self._layer = layer

    def dispatch(self, x: Tensor, routing: Routing) -> Sequence[Trip]:
        self.leader.call(self._layer, x, routing)
        with self.leader.exchanging():
            return [_LedTrip(self.leader, trip) for trip in self.inner.dispatch(x, routing)]

    def combine(self, trips: Sequence[Trip]) -> Tensor:
        y_TD = self.inner.combine(trips)
        self.leader.done()
        return y_TD


class _LedTrip:
    """A trip that says which of its errors are lost ranks."""

    def __init__(self, leader: Leader, inner: Trip) -> None:
        self.leader, self.inner = leader, inner

    def arrive(self) -> tuple[Tensor, Routing]:
        with self.leader.exchanging():
            return self.inner.arrive()

    def send_back(self, rows: Tensor) -> None:
        with self.leader.exchanging():
            self.inner.send_back(rows)

    def come_home(self) -> Tensor:
        with self.leader.exchanging():
            return self.inner.come_home()


def lead(model: Transformer, company: Company) -> Leader:
    """Has `model`, which has this rank's share of experts, compute with those of all."""
    assert model.config.moe is not None
    leader = Leader(company)
    for index, layer in enumerate(model.moe_layers):
        layer.dispatcher = LeadingDispatcher(leader, index, company.dispatcher(model.config.moe.num_experts))
    return leader


def leader_of(model: Transformer) -> Leader | None:
    """Where the experts of `model` are shared out over ranks."""
    for layer in model.moe_layers:
        if isinstance(layer.dispatcher, LeadingDispatcher):
            return layer.dispatcher.leader
    return None


@torch.inference_mode()
def follow(model: Transformer, company: Company) -> None:
    """Computes the experts of `model` that are here until the first rank needs them no more. All else in `model` may be
    on the meta device.

    Raises LostRankError where the first rank has ended without a word, or another one has.
    """
    assert model.config.moe is not None
    num_experts = model.config.moe.num_experts
    dispatcher = company.dispatcher(num_experts)
    while True:
        word = torch.zeros(3, dtype=torch.int64)
        with _given_up():
            dist.broadcast(word, 0, group=company.control)
        layer, x_code, weights_code = word.tolist()
        if layer == END:
            return
        experts = model.moe_layers[layer].experts
        device = next(chain(experts.parameters(), experts.buffers())).device
        x_0D = torch.empty(0, model.config.hidden_size, dtype=DTYPES[x_code], device=device)
        with _given_up():
            trips = dispatcher.dispatch(x_0D, _no_routing(num_experts, DTYPES[weights_code], device))
        for trip in trips:
            with _given_up():
                x_RD, routing = trip.arrive()
            y_RD = experts(x_RD, routing)
            with _given_up():
                trip.send_back(y_RD)
        with _given_up():
            dispatcher.combine(trips)


@contextmanager
def _given_up() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise LostRankError("the first rank, or another one, has ended") from error


def _no_routing(num_experts: int, dtype: torch.dtype, device: torch.device) -> Routing:
    none = torch.empty(0, dtype=torch.int64, device=device)
    return Routing(
        token_ids=none,
        expert_ids=none,
        weights=torch.empty(0, dtype=dtype, device=device),
        logits=torch.empty(0, num_experts, device=device),
        num_experts=num_experts,
        top_k=None,
    )


def join(device_type: str) -> Company:
    """The company that torchrun's variables describe."""
    if device_type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=EXCHANGE_TIMEOUT)
    return Company()
