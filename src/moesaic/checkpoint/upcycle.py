"""Upcycling: a dense checkpoint becomes a sparse one that computes the same, one layer at a time.

`copy` is sparse upcycling (arXiv 2212.05055): every expert is a copy of the dense MLP. The weights of a token sum to 1,
so equal experts give what the MLP gave, whichever are chosen. `granular` is virtual group initialisation (arXiv
2410.07524): the MLP is cut along its inner width into G shards, a group of G neighbouring experts holds them all, and
the groups are copies. The router has one row per group, repeated G times, so the G logits of a group are equal and the
K best experts are the K / G best groups whole. Then each of these K experts has weight w of its group, G times the sum
of w over the groups is 1, and the shards, their last projection times G, add up to the dense MLP.

What decides is that groups differ, not how ties within a group are ordered. Should two groups tie at the border of the
choice, to the last bit of their scores, a token may get shards of both; in float32 that is one token in millions. Who
computes logits in bfloat16 meets it more often.

A dense layer is read when its first tensor is written, and let go with its last: no more than one is in memory, besides
the tensor that is being written. E experts, K experts per token, G granularity, D hidden size, F dense intermediate
size, f = F / G.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from moesaic.checkpoint.families import family_for_export
from moesaic.checkpoint.families.family import Family
from moesaic.checkpoint.families.layout import Region, Shape, StoredTensor
from moesaic.checkpoint.load import empty_model
from moesaic.checkpoint.plain_model import PlainModel, Progress, open_plain, reporting
from moesaic.checkpoint.resolve import require_weights, resolve_model
from moesaic.checkpoint.save import new_directory, plan, require_outside, write_configs
from moesaic.checks import require, require_not_negative, require_positive, require_seed
from moesaic.config import ModelConfig, MoEConfig
from moesaic.errors import MoesaicError, UsageError
from moesaic.ops import DTYPES
from moesaic.weights_io import atomic_directory, write_sharded

ROUTER_STD = 0.02
"""Of the routers' weights, where the model has no initializer_range."""


@dataclass(frozen=True, kw_only=True)
class Upcycling:
    """What the experts are made of. Checks itself; whether it fits a model shows when the two meet."""

    num_experts: int
    """E, routed experts per layer."""
    top_k: int
    """K, routed experts that each token visits."""
    method: Literal["copy", "granular"] = "copy"
    granularity: int = 1
    """G, shards of the dense MLP; E and K are multiples of it. K = G costs what the dense model costs."""
    noise: float = 0.0
    """Standard deviation of what is added to each weight of an expert, relative to that of its matrix; above 0 the
    sparse model no longer computes what the dense one does."""
    seed: int = 0
    """Of routers and noise."""

    def __post_init__(self) -> None:
        require_positive(self, "num_experts", "top_k", "granularity")
        require_not_negative(self, "noise")
        require_seed(self.seed)
        experts, top_k, granularity = self.num_experts, self.top_k, self.granularity
        require(top_k <= experts, f"top_k is {top_k} but num_experts is {experts}; a token can visit at most {experts}")
        require(self.method in ("copy", "granular"), f"method {self.method!r} is not known; choose copy or granular")
        require(
            self.method == "granular" or granularity == 1,
            f"granularity is {granularity}, but method copy does not cut the MLP; use method granular",
        )
        require(
            self.method == "copy" or granularity > 1,
            f"method granular cuts the MLP into {granularity} shard; set granularity to 2 or more, or use method copy",
        )
        require(
            experts % granularity == 0 and top_k % granularity == 0,
            f"num_experts is {experts} and top_k {top_k}, but with granularity {granularity} both are multiples of it: "
            f"a token visits whole groups of {granularity} experts",
        )


@dataclass(frozen=True)
class Upcycled:
    """What was made of what; `family` is the model_type of the new directory."""

    family: str
    dense: ModelConfig
    sparse: ModelConfig


def upcycle(
    model: str | Path,
    directory: str | Path,
    how: Upcycling,
    *,
    dtype: str = "auto",
    offline: bool = False,
    revision: str | None = None,
    progress: Progress = lambda label, done, total: None,
) -> Upcycled:
    """Writes `directory`, a Hugging Face directory, from MODEL, a dense one; `dtype`, `offline` and `revision` as for
    `load`. A run directory is held in memory as a whole, anything else one layer at a time.

    Raises UsageError when `directory` holds something or lies inside MODEL, when MODEL is sparse or does not fit `how`,
    and when no sparse family has its kind of decoder, with the nearest one; MoesaicError for files without the model
    they promise.
    """
    directory = new_directory(directory)
    require(dtype in ("auto", *DTYPES), f"dtype {dtype!r} is not known; choose auto, {' or '.join(DTYPES)}")
    source = resolve_model(model, revision, offline)
    require_outside(directory, source)
    require_weights(source, offline)
    with open_plain(source, dtype) as dense:
        config, family = sparse_config(dense.config, how)
        like = empty_model(config).to(dense.dtype).state_dict()
        sparse = _SparseModel(dense, config, how, like)
        tensors = reporting(plan(family.layout(config), like, sparse.stored), progress)
        with atomic_directory(directory, bytes_needed=sum(tensor.nbytes for tensor in tensors)) as temporary:
            write_configs(temporary, family, config, dense.dtype)
            write_sharded(temporary, tensors)
            dense.carry(temporary)
    return Upcycled(family.model_type, dense.config, config)


def sparse_config(dense: ModelConfig, how: Upcycling) -> tuple[ModelConfig, Family]:
    """The same decoder with experts, and the first family that can express it."""
    name = dense.model_type or "this model"
    if dense.moe is not None:
        raise UsageError(f"{name} has {dense.moe.num_experts} experts already; name a dense model")
    width, rest = divmod(dense.intermediate_size, how.granularity)
    require(
        rest == 0,
        f"granularity is {how.granularity}, which does not divide the intermediate_size {dense.intermediate_size} of "
        f"{name}; choose one that does",
    )
    moe = MoEConfig(
        num_experts=how.num_experts,
        num_experts_per_tok=how.top_k,
        moe_intermediate_size=width,
        projection_bias=dense.mlp_bias,
    )
    config = replace(dense, moe=moe, mlp_bias=False, model_type="")
    try:
        return config, family_for_export(config)
    except MoesaicError as error:
        raise UsageError(f"{name} cannot be upcycled: {error}") from error


class _SparseModel:
    """Makes the stored tensors of the sparse model, one by one, of one layer of the dense model at a time."""

    def __init__(self, dense: PlainModel, config: ModelConfig, how: Upcycling, like: Mapping[str, Tensor]) -> None:
        self._dense, self._how, self._like = dense, how, like
        self._router_std = config.initializer_range or ROUTER_STD
        self._in_memory: Mapping[str, Tensor] = {}

    def stored(self, stored: StoredTensor) -> Tensor:
        views = stored.views({region.ours: self._shown(region) for region in stored.regions})
        return views[0] if len(views) == 1 else torch.cat(views)

    def _shown(self, region: Region) -> Tensor:
        """Our tensor as far as the region shows it: where that is one expert, it stands for all of them."""
        layer, _, part = region.ours.partition(".feed_forward.")
        if not part:
            return self._dense_tensor(region.ours)
        if part == "router.weight":
            return self._router(layer)
        shape = tuple(self._like[region.ours].shape)
        expert = _only_expert(region, shape)
        if expert is not None:
            return self._expert(layer, part, expert).expand(shape)
        experts = torch.empty(shape, dtype=self._dense.dtype)
        for index, one in enumerate(experts):
            one.copy_(self._expert(layer, part, index))
        return experts

    def _router(self, layer: str) -> Tensor:
        """(E, D): a random row for each group of experts."""
        groups, hidden_size = self._how.num_experts // self._how.granularity, self._dense.config.hidden_size
        rows = torch.empty(groups, hidden_size).normal_(0.0, self._router_std, generator=self._stream(layer))
        return rows.repeat_interleave(self._how.granularity, dim=0).to(self._dense.dtype)

    def _expert(self, layer: str, part: str, expert: int) -> Tensor:
        """Of one expert gate and up (2f, D), or down (D, f) times G."""
        granularity = self._how.granularity
        width = self._dense.config.intermediate_size // granularity
        first = expert % granularity * width
        if part == "experts.down":
            shard = self._dense_tensor(f"{layer}.feed_forward.down_proj.weight")[:, first : first + width]
            matrices = [shard if granularity == 1 else shard * granularity]
        else:
            names = [f"{layer}.feed_forward.{leaf}_proj.weight" for leaf in ("gate", "up")]
            matrices = [self._dense_tensor(name)[first : first + width] for name in names]
        if self._how.noise:
            stream = self._stream(layer, part, expert)
            matrices = [_noisy(matrix, self._how.noise, stream) for matrix in matrices]
        return matrices[0] if len(matrices) == 1 else torch.cat(matrices)

    def _dense_tensor(self, name: str) -> Tensor:
        """One tensor of the dense model; its layer is read with it, in place of the one before."""
        if name not in self._in_memory:
            block, index, *_ = name.split(".")
            layer = [other for other in self._dense.dtypes if other.startswith(f"{block}.{index}.")]
            self._in_memory = {}  # let go before the next is read
            self._in_memory = self._dense.read(layer if block == "layers" else [name])
        return self._in_memory[name]

    def _stream(self, *label: object) -> torch.Generator:
        """Random numbers of their own for each router and expert, in whatever order these are written."""
        digest = hashlib.sha256(repr((self._how.seed, *label)).encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def _only_expert(region: Region, shape: Shape) -> int | None:
    """The one expert of a stack (E, rows, columns) that a region shows; None when it shows several."""
    numbers = region.view(torch.arange(shape[0]).view(-1, 1, 1).expand(shape))
    return None if any(numbers.stride()) else int(numbers[(0,) * numbers.ndim])


def _noisy(matrix: Tensor, noise: float, stream: torch.Generator) -> Tensor:
    wide = matrix.float()
    added = torch.empty(wide.shape).normal_(0.0, noise * float(wide.std()), generator=stream)
    return added.add_(wide).to(matrix.dtype)
