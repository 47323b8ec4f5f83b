"""A model's directory with fewer experts, written tensor by tensor: what pruning and merging share.

When the first tensor of a layer's experts is written, the layer's experts and router are read and made fewer, and the
matrices are kept until another layer's turn comes: beyond what is written no more than one layer is in memory.

E experts before, e experts after.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from moesaic.checkpoint.families import family_for_export
from moesaic.checkpoint.families.family import Family
from moesaic.checkpoint.families.layout import StoredTensor
from moesaic.checkpoint.load import empty_model
from moesaic.checkpoint.plain_model import PlainModel, Progress, open_plain, reporting
from moesaic.checkpoint.resolve import ModelSource, require_weights, resolve_model
from moesaic.checkpoint.save import new_directory, plan, require_outside, write_configs
from moesaic.checks import require
from moesaic.config import ModelConfig, MoEConfig
from moesaic.errors import UsageError
from moesaic.ops import DTYPES
from moesaic.weights_io import MAX_SHARD_BYTES, PlannedTensor, atomic_directory, write_sharded

Read = Callable[[str], Tensor]
"""One part of a layer's feed-forward, such as `experts.gate_up` (E, 2F, D) or `router.weight` (E, D)."""
Reduce = Callable[[int, Sequence[str], Read], Mapping[str, Tensor]]
"""(layer, names of its parts that have one entry per expert, how to read them) -> the same with e entries."""
MATRICES = ("experts.gate_up", "experts.down")


@dataclass(frozen=True)
class Reduced:
    """What was made; `family` is the model_type of the new directory, sizes are in bytes."""

    family: str
    before: ModelConfig
    after: ModelConfig
    dtype: torch.dtype
    nbytes_before: int
    """Of the model before, its weights in the types that they have now."""
    nbytes: int


@dataclass(frozen=True)
class Reducible:
    """A model that can be written with fewer experts, and where to."""

    plain: PlainModel
    directory: Path
    after: ModelConfig
    family: Family

    @property
    def before(self) -> ModelConfig:
        return self.plain.config

    @property
    def moe(self) -> MoEConfig:
        """Of the model before."""
        assert self.before.moe is not None
        return self.before.moe

    @property
    def layers(self) -> list[int]:
        """The numbers of those with experts."""
        return [index for index in range(self.before.num_hidden_layers) if self.before.is_moe_layer(index)]

    def write(self, reduce: Reduce, progress: Progress, max_shard_bytes: int = MAX_SHARD_BYTES) -> Reduced:
        """Raises MoesaicError where the disk is full or cannot be written; then nothing has changed."""
        fewer = _FewerExperts(self, reduce)
        tensors = reporting(_planned(self, self.after, fewer.stored), progress)
        with atomic_directory(self.directory, bytes_needed=sum(tensor.nbytes for tensor in tensors)) as temporary:
            write_configs(temporary, self.family, self.after, self.plain.dtype)
            write_sharded(temporary, tensors, max_shard_bytes)
            self.plain.carry(temporary)
        return Reduced(
            family=self.family.model_type,
            before=self.before,
            after=self.after,
            dtype=self.plain.dtype,
            nbytes_before=sum(tensor.nbytes for tensor in _planned(self, self.before, fewer.stored)),
            nbytes=sum(tensor.nbytes for tensor in tensors),
        )


@contextmanager
def open_reducible(
    model: str | Path | ModelSource,
    directory: str | Path,
    keep: int,
    *,
    dtype: str = "auto",
    offline: bool = False,
    revision: str | None = None,
) -> Iterator[Reducible]:
    """`dtype`, `offline` and `revision` as for `load`. A run directory is held in memory as a whole.

    Raises UsageError when `directory` holds something or lies inside MODEL, when MODEL is quantised, dense, or cannot
    have `keep` experts; MoesaicError for what no family can express, and for files without the model they promise.
    """
    directory = new_directory(directory)
    require(dtype in ("auto", *DTYPES), f"dtype {dtype!r} is not known; choose auto, {' or '.join(DTYPES)}")
    source = resolve_model(model, revision, offline)
    require_outside(directory, source)
    require_weights(source, offline)
    with open_plain(source, dtype) as plain:
        after = with_experts(plain.config, keep)
        yield Reducible(plain, directory, after, family_for_export(after))


def with_experts(config: ModelConfig, keep: int) -> ModelConfig:
    """The same model with `keep` experts in each layer.

    Raises UsageError, with the nearest number that is possible, where it cannot have so many.
    """
    moe = config.moe
    if moe is None:
        raise UsageError(f"{config.model_type or 'this model'} has no experts; name a sparse model")
    experts, groups, least = moe.num_experts, moe.n_group, fewest_experts(moe)
    visits = f"a token visits {moe.num_experts_per_tok} experts{_of_groups(moe)}"
    require(least < experts, f"each layer has {experts} experts and {visits}; none can go")
    require(keep >= least, f"keep is {keep}, but {visits}; keep {least} or more")
    require(
        keep < experts,
        f"keep is {keep} and each layer has {experts} experts; keep from {least} to {experts - groups}",
    )
    require(
        keep % groups == 0,
        f"keep is {keep}, but the experts are in {groups} groups of equally many; keep {keep // groups * groups} or "
        f"{-(-keep // groups) * groups}",
    )
    return replace(config, moe=replace(moe, num_experts=keep))


def fewest_experts(moe: MoEConfig) -> int:
    """That such a router can choose among: each group needs its share of a token's experts, and two where the sum of
    the best two is what a group is worth."""
    of_group = -(-moe.num_experts_per_tok // moe.topk_group) if moe.n_group > 1 else moe.num_experts_per_tok
    if moe.n_group > 1 and moe.group_score == "top2_sum":
        of_group = max(of_group, 2)
    return moe.n_group * of_group


def _of_groups(moe: MoEConfig) -> str:
    return "" if moe.n_group == 1 else f" of {moe.topk_group} of {moe.n_group} groups"


def require_kept(moe: MoEConfig, layers: Sequence[int], kept: Mapping[int, Sequence[int]]) -> None:
    """Raises UsageError unless `kept` has distinct experts of every layer, equally many, and as many of each group."""
    strange, missing = sorted(kept.keys() - set(layers)), sorted(set(layers) - kept.keys())
    require(not strange, f"layer {_first(strange)} has no experts; those that do are {_shown(layers)}")
    require(not missing, f"nothing says which experts layer {_first(missing)} keeps; name some for {_shown(layers)}")
    first = layers[0]
    for layer, experts in sorted(kept.items()):
        for expert in experts:
            require(
                0 <= expert < moe.num_experts,
                f"layer {layer} is to keep expert {expert}, but has experts 0 to {moe.num_experts - 1}",
            )
        require(
            len(set(experts)) == len(experts), f"layer {layer} is to keep an expert twice: {_shown(sorted(experts))}"
        )
        require(
            len(experts) == len(kept[first]),
            f"layer {layer} is to keep {len(experts)} experts and layer {first} {len(kept[first])}, but a config.json "
            "has one number for all layers; keep equally many",
        )
        size = moe.num_experts // moe.n_group
        by_group = [sum(expert // size == group for expert in experts) for group in range(moe.n_group)]
        require(
            len(set(by_group)) == 1,
            f"layer {layer} is to keep {_shown(by_group)} experts of its {moe.n_group} groups of {size}; keep equally "
            "many of each",
        )


def _first(numbers: Sequence[int]) -> int | None:
    return numbers[0] if numbers else None


def _shown(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _planned(model: Reducible, config: ModelConfig, made: Callable[[StoredTensor], Tensor]) -> Sequence[PlannedTensor]:
    dtypes = model.plain.dtypes
    like = {name: tensor.to(dtypes[name]) for name, tensor in empty_model(config).state_dict().items()}
    return plan(model.family.layout(config), like, made)


class _FewerExperts:
    """The tensors of the new model, made one by one."""

    def __init__(self, model: Reducible, reduce: Reduce) -> None:
        self._plain, self._reduce = model.plain, reduce
        self._parts = _parts_per_expert(model.before, model.after)
        moe = model.after.moe
        assert moe is not None
        # What the family has no factor for is multiplied into the experts, as in an export.
        self._scale = moe.routed_scaling_factor if model.family.folds_into_experts else 1.0
        self._in_memory: Mapping[str, Tensor] = {}
        self._small: dict[str, Tensor] = {}
        """Routers and biases of all layers so far: files hold them far from the matrices, which would be read again."""

    def stored(self, stored: StoredTensor) -> Tensor:
        views = stored.views({region.ours: self._tensor(region.ours) for region in stored.regions})
        return views[0] if len(views) == 1 else torch.cat(views)

    def _tensor(self, name: str) -> Tensor:
        layer, _, part = name.partition(".feed_forward.")
        if part in self._parts:
            if name not in self._in_memory and name not in self._small:
                self._make_fewer(layer)
            return self._small[name] if name in self._small else self._in_memory[name]
        if name not in self._in_memory:
            self._in_memory = {}  # let go before the next is read
            together = self._plain.joined(name)
            read = self._plain.read(together)  # of a run, all tensors
            self._in_memory = {each: read[each] for each in together}
        return self._in_memory[name]

    def _make_fewer(self, layer: str) -> None:
        self._in_memory = {}

        def read(part: str) -> Tensor:
            name = f"{layer}.feed_forward.{part}"
            return self._plain.read(self._plain.joined(name))[name]

        parts = dict(self._reduce(int(layer.rpartition(".")[2]), self._parts, read))
        if self._scale != 1.0:  # no family without the factor has biases, which it would multiply too
            parts["experts.down"] = parts["experts.down"] * self._scale
        named = {f"{layer}.feed_forward.{part}": tensor for part, tensor in parts.items()}
        self._in_memory = {name: tensor for name, tensor in named.items() if name.endswith(MATRICES)}
        self._small |= {name: tensor for name, tensor in named.items() if name not in self._in_memory}


def _parts_per_expert(before: ModelConfig, after: ModelConfig) -> list[str]:
    """Of a layer's feed-forward: what has another shape with fewer experts."""
    shapes = [
        {name: tensor.shape for name, tensor in empty_model(each).state_dict().items()} for each in (before, after)
    ]
    changed = [name for name, shape in shapes[0].items() if shapes[1][name] != shape]
    return list(dict.fromkeys(name.partition(".feed_forward.")[2] for name in changed))
