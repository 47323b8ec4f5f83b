"""How a model is cut over the devices of a cluster: dp x fsdp x pp x tp, with experts over ep of them.

World = dp x fsdp x pp x tp. Experts are laid over the dp x fsdp x tp devices of a stage (as in MoE Parallel Folding,
arXiv 2504.14960), so ep divides that product; what remains of it holds copies of the experts, sharded where fsdp says.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Literal

from moesaic.checks import require
from moesaic.config import ModelConfig
from moesaic.errors import UsageError

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One way to cut; 1 means that nothing is cut along this way."""

    dp: int = 1
    """Copies that see other tokens."""
    fsdp: int = 1
    """Such, with parameters, gradients and optimizer state cut among them."""
    ep: int = 1
    pp: int = 1
    """Stages of layers."""
    tp: int = 1
    """Devices that share every matrix product."""
    vp: int = 1
    """Parts that each stage's layers come in (interleaved 1F1B): shorter bubbles, more transfers."""
    micro: int = 1
    """Sequences of a micro-batch."""
    recompute: Recompute = "none"
    """What the backward pass computes again: nothing, the cheap parts, or whole blocks."""

    @property
    def world(self) -> int:
        return self.dp * self.fsdp * self.pp * self.tp

    @property
    def replicas(self) -> int:
        """Groups that see different tokens."""
        return self.dp * self.fsdp

    @property
    def expert_copies(self) -> int:
        """Devices of a stage that hold the same experts, or shares of them."""
        return self.replicas * self.tp // self.ep

    def __str__(self) -> str:
        shown = [f"{name}{getattr(self, name)}" for name in ("dp", "fsdp", "ep", "pp", "tp", "vp")
                 if getattr(self, name) > 1]  # fmt: skip
        return " ".join(shown) or "one device"


def check_layout(layout: Layout, config: ModelConfig, count: int) -> None:
    """Raises UsageError, with the numbers, for what cannot be cut so."""
    shown = f"dp {layout.dp} x fsdp {layout.fsdp} x pp {layout.pp} x tp {layout.tp}"
    require(
        layout.world == count,
        f"{shown} = {layout.world} devices, but the cluster has {count}; make the product {count}",
    )
    require(
        layout.pp * layout.vp <= config.num_hidden_layers,
        f"pp {layout.pp} x vp {layout.vp} needs as many layers; the model has {config.num_hidden_layers}",
    )
    require(
        config.num_attention_heads % layout.tp == 0,
        f"tp is {layout.tp}, but {config.num_attention_heads} heads cannot be dealt evenly; choose a divisor",
    )
    if config.moe is None:
        require(layout.ep == 1, f"ep is {layout.ep}, but the model is dense and has no experts; set ep=1")
        return
    require(
        config.moe.num_experts % layout.ep == 0,
        f"ep is {layout.ep}, but {config.moe.num_experts} experts cannot be dealt evenly; choose a divisor",
    )
    shared = layout.replicas * layout.tp
    require(
        shared % layout.ep == 0,
        f"ep is {layout.ep}, but it must divide dp x fsdp x tp = {shared}, the devices of a stage; choose a divisor",
    )


def device_max_vio(layout: Layout, config: ModelConfig, max_vio: float) -> float:
    """Imbalance between devices: of many experts on one, loads even out as independent ones would."""
    if config.moe is None or layout.ep == 1:
        return 0.0
    return max_vio / (config.moe.num_experts / layout.ep) ** 0.5


def parse_layout(text: str, count: int) -> Layout:
    """`ep=8,tp=2,pp=4`, in any order; what is left of the `count` devices becomes dp, unless dp or fsdp is given."""
    known = {field.name for field in fields(Layout)}
    values: dict[str, int] = {}
    recompute: Recompute = "none"
    for part in filter(None, re.split(r"[,\s]+", text.strip())):
        name, equals, value = part.partition("=")
        name = name.lower()
        if name == "recompute" and value in ("none", "selective", "full"):
            recompute = value  # type: ignore[assignment]
            continue
        if name not in known or name == "recompute" or not equals or not value.isdecimal() or not int(value):
            raise UsageError(
                f"--parallel: {part!r} is not understood; write numbers of 1 or more, like dp=2,fsdp=4,ep=8,pp=1,tp=1, "
                "and if wanted vp=2, micro=1, recompute=none|selective|full"
            )
        values[name] = int(value)
    if "dp" not in values:
        taken = values.get("fsdp", 1) * values.get("pp", 1) * values.get("tp", 1)
        values["dp"] = max(1, count // taken)
    return Layout(**values, recompute=recompute)


def to_mapping(layout: Layout) -> Mapping[str, int | str]:
    return {field.name: getattr(layout, field.name) for field in fields(Layout)}
