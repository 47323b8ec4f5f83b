"""Merging: a model's directory in which clusters of similar experts have become one expert each.

The merged expert is the weighted mean of its members, as in M-SMoE (arXiv 2310.01334) and HC-SMoE (arXiv 2410.08589),
after their hidden units were brought into one order: an expert computes the same whatever the order of its units, and
the mean of two units that have nothing to do with each other is none of the two.

Both papers keep the router of all experts and send what it chooses to the merged ones; where several members of a
cluster are chosen, their weights add up. No published family can say that, so a merged expert gets one row of the
router: that of its leading member. The mean of the members' rows was no better (docs/pruning.md).

E experts before, e experts after, F inner width, D hidden size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moesaic.checkpoint.plain_model import Progress
from moesaic.checkpoint.reduce_experts import Read, Reduced, open_reducible, require_kept
from moesaic.checkpoint.resolve import ModelSource
from moesaic.checks import require
from moesaic.config import MoEConfig
from moesaic.errors import MoesaicError, UsageError
from moesaic.weights_io import MAX_SHARD_BYTES


@dataclass(frozen=True)
class Cluster:
    """Experts of one layer that become one."""

    experts: tuple[int, ...]
    """The first leads: the others take the order of its hidden units, and its row of the router stays."""
    weights: tuple[float, ...]
    """Each expert's part of the mean; they sum to 1."""

    @classmethod
    def of(cls, experts: Sequence[int], loads: Tensor) -> "Cluster":
        """Weighed by loads (E,), the tokens that visit each; where no token came, the lead alone counts."""
        weights = [float(loads[expert]) for expert in experts]
        total = sum(weights)
        alone = [1.0] + [0.0] * (len(weights) - 1)
        return cls(tuple(experts), tuple(weight / total for weight in weights) if total else tuple(alone))

    @property
    def lead(self) -> int:
        return self.experts[0]


def merge(
    model: str | Path | ModelSource,
    directory: str | Path,
    clusters: Mapping[int, Sequence[Cluster]],
    *,
    dtype: str = "auto",
    offline: bool = False,
    revision: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress = lambda label, done, total: None,
) -> Reduced:
    """Writes `directory`, a Hugging Face directory of MODEL's family, in which the experts of layer number i are the
    means of `clusters[i]`, in the order of their leading members. All layers have equally many clusters.

    Raises UsageError for clusters that do not fit MODEL, and like `open_reducible`.
    """
    by_layer = {layer: sorted(each, key=lambda cluster: cluster.lead) for layer, each in clusters.items()}
    keep = len(next(iter(by_layer.values()), ()))
    with open_reducible(model, directory, keep, dtype=dtype, offline=offline, revision=revision) as reducible:
        _require_clusters(reducible.moe, reducible.layers, by_layer)

        def reduce(layer: int, parts: Sequence[str], read: Read) -> Mapping[str, Tensor]:
            return _merged(by_layer[layer], {part: read(part) for part in parts})

        return reducible.write(reduce, progress, max_shard_bytes)


def _require_clusters(moe: MoEConfig, layers: Sequence[int], clusters: Mapping[int, Sequence[Cluster]]) -> None:
    """Raises UsageError unless each expert is in one cluster, and none reaches over groups."""
    require_kept(moe, layers, {layer: [cluster.lead for cluster in each] for layer, each in clusters.items()})
    size = moe.num_experts // moe.n_group
    for layer, each in clusters.items():
        members = sorted(expert for cluster in each for expert in cluster.experts)
        require(
            members == list(range(moe.num_experts)),
            f"the clusters of layer {layer} have {len(members)} members, {len(set(members))} of them distinct, and the "
            f"layer {moe.num_experts} experts; put each into one cluster",
        )
        for cluster in each:
            if len({expert // size for expert in cluster.experts}) > 1:
                raise UsageError(
                    f"layer {layer} is to merge the experts {', '.join(map(str, cluster.experts))}, which are of "
                    f"different groups of {size}; merge within groups"
                )


def _merged(clusters: Sequence[Cluster], parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    leads = torch.tensor([cluster.lead for cluster in clusters])
    made = {part: tensor[leads] for part, tensor in parts.items()}
    for index, cluster in enumerate(clusters):
        if len(cluster.experts) > 1:
            for part, mean in _mean(cluster, parts).items():
                made[part][index] = mean.to(made[part].dtype)
    return made


def _mean(cluster: Cluster, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of the experts' own parts, without those of the router."""
    lead = _Expert.of(parts, cluster.lead)
    sums = {part: cluster.weights[0] * tensor for part, tensor in lead.parts().items()}
    for expert, weight in zip(cluster.experts[1:], cluster.weights[1:], strict=True):
        for part, tensor in _Expert.of(parts, expert).in_order_of(lead).parts().items():
            sums[part] += weight * tensor
    return sums


@dataclass(frozen=True)
class _Expert:
    """One expert in float32, its hidden units along the first axis of all but `down_bias`."""

    gate: Tensor
    """(F, D), and likewise `up` and `down`, which is transposed."""
    up: Tensor
    down: Tensor
    biases: Mapping[str, Tensor]

    @classmethod
    def of(cls, parts: Mapping[str, Tensor], expert: int) -> "_Expert":
        gate_FD, up_FD = parts["experts.gate_up"][expert].float().chunk(2)
        biases = {}
        if "experts.gate_up_bias" in parts:
            gate_F, up_F = parts["experts.gate_up_bias"][expert].float().chunk(2)
            biases = {"gate": gate_F, "up": up_F, "down": parts["experts.down_bias"][expert].float()}
        return cls(gate_FD, up_FD, parts["experts.down"][expert].float().T, biases)

    def in_order_of(self, other: "_Expert") -> "_Expert":
        """The same function, its hidden units in the order of those of `other` that they are most like."""
        likeness_FF = other.gate @ self.gate.T + other.up @ self.up.T + other.down @ self.down.T
        if not likeness_FF.isfinite().all():
            raise MoesaicError("experts with weights that are not finite cannot be merged; name a model without them")
        order_F = match(likeness_FF)
        biases = {name: bias if name == "down" else bias[order_F] for name, bias in self.biases.items()}
        return _Expert(self.gate[order_F], self.up[order_F], self.down[order_F], biases)

    def parts(self) -> dict[str, Tensor]:
        """As our model has them."""
        made = {"experts.gate_up": torch.cat((self.gate, self.up)), "experts.down": self.down.T}
        if self.biases:
            made["experts.gate_up_bias"] = torch.cat((self.biases["gate"], self.biases["up"]))
            made["experts.down_bias"] = self.biases["down"]
        return made


def match(likeness: Tensor) -> Tensor:
    """likeness (F, F) of row units to column units -> (F,), the column of each row, all distinct.

    Greedy: the most alike pair of all is matched, then the most alike of what is left, and so on. Pairs that are each
    other's best are matched at the same time, which comes to the same.
    """
    columns_F = torch.empty(len(likeness), dtype=torch.int64)
    rows, columns = torch.arange(len(likeness)), torch.arange(len(likeness))
    while len(rows):
        best_column, best_row = likeness.argmax(1), likeness.argmax(0)
        mutual = best_row[best_column] == torch.arange(len(rows))
        columns_F[rows[mutual]] = columns[best_column[mutual]]
        taken = torch.zeros(len(columns), dtype=torch.bool)
        taken[best_column[mutual]] = True
        rows, columns, likeness = rows[~mutual], columns[~taken], likeness[~mutual][:, ~taken]
    return columns_F
