"""How experts are computed: a table of backends and the choice among them.

A backend is a function (x (T, D), Routing, ExpertWeights) -> y (T, D). It permutes locally, runs the experts and
combines with the routing's weights, so that a kernel may fuse all three. Outputs equal `reference`, and so do gradients
where a backend has them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.errors import UsageError
from moesaic.ops.activation import ACTIVATIONS, Activation
from moesaic.ops.grouped import grouped_experts
from moesaic.ops.native import NATIVE_ACTIVATIONS, native_experts, why_native_is_missing
from moesaic.ops.native_packed import PACKED_DTYPES, packed_experts
from moesaic.ops.quantize import FORMATS
from moesaic.ops.reference import reference_experts
from moesaic.ops.routing import Choice, Routing
from moesaic.ops.weights import PLAIN, ExpertWeights

__all__ = [
    "ACTIVATIONS",
    "BACKENDS",
    "DTYPES",
    "PLAIN",
    "Activation",
    "Backend",
    "Choice",
    "ExpertShape",
    "ExpertWeights",
    "Routing",
    "pick",
    "refusal",
    "require_known",
]


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""What a config's or a flag's dtype names."""


@dataclass(frozen=True)
class ExpertShape:
    """What a backend needs to know before it can accept a layer."""

    hidden_size: int
    moe_intermediate_size: int
    device: str
    """Device type: `cpu`, `cuda` ..."""
    dtype: torch.dtype
    """What the products are computed in."""
    activation: str = "swiglu"
    has_bias: bool = False
    """Whether there are biases on the experts' projections."""
    format: str = PLAIN
    """Of the weights: plain, or packed as moesaic.ops.quantize.FORMATS names it."""


@dataclass(frozen=True)
class Backend:
    """One way to compute experts, and what it can do."""

    run: Callable[[Tensor, Routing, ExpertWeights], Tensor]
    devices: frozenset[str]
    dtypes: frozenset[torch.dtype]
    activations: frozenset[str]
    biases: bool
    """Whether it adds biases to the experts' projections."""
    formats: frozenset[str] = frozenset({PLAIN})
    """Of weights that it computes with."""
    gradients: bool = True
    row_alignment_bytes: int = 1
    """hidden_size and moe_intermediate_size must fill a multiple of this many bytes."""
    missing: Callable[[], str | None] = lambda: None
    """Why this machine cannot run it at all; None when it can."""
    about: str = ""


# In the order of preference: the first that accepts a layer is what `auto` means.
BACKENDS: dict[str, Backend] = {
    "native": Backend(
        run=native_experts,
        devices=frozenset({"cpu"}),
        dtypes=frozenset({torch.float32, torch.bfloat16}),
        activations=frozenset(NATIVE_ACTIVATIONS),
        biases=True,
        missing=why_native_is_missing,
        about="fused C++ kernels for CPUs",
    ),
    "grouped": Backend(
        run=grouped_experts,
        devices=frozenset({"cpu", "cuda"}),
        dtypes=frozenset({torch.float32, torch.bfloat16}),
        activations=frozenset(ACTIVATIONS),
        biases=True,
        row_alignment_bytes=16,
        about="grouped matrix products of torch over rows sorted by expert",
    ),
    "packed": Backend(
        run=packed_experts,
        devices=frozenset({"cpu", "cuda", "mps"}),
        dtypes=PACKED_DTYPES,
        activations=frozenset(NATIVE_ACTIVATIONS),
        biases=True,
        formats=frozenset(FORMATS),
        gradients=False,
        about="packed weights by C++ kernels, or unpacked where there are none",
    ),
    "reference": Backend(
        run=reference_experts,
        devices=frozenset({"cpu", "cuda", "mps"}),
        dtypes=frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16}),
        activations=frozenset(ACTIVATIONS),
        biases=True,
        formats=frozenset({PLAIN, *FORMATS}),
        about="a plain loop over experts; slow, right, everywhere",
    ),
}


def refusal(name: str, shape: ExpertShape) -> str | None:
    """Why backend `name` cannot compute a layer of this shape; None when it can."""
    backend = BACKENDS[name]
    if shape.device not in backend.devices:
        return f"runs on {', '.join(sorted(backend.devices))}, not on {shape.device}"
    if shape.dtype not in backend.dtypes:
        return f"computes in {', '.join(sorted(map(str, backend.dtypes)))}, not in {shape.dtype}"
    if shape.activation not in backend.activations:
        return f"computes {', '.join(sorted(backend.activations))}, not {shape.activation}"
    if shape.format not in backend.formats:
        return f"takes {', '.join(sorted(backend.formats))} weights, not {shape.format}"
    if shape.has_bias and not backend.biases:
        return "adds no biases to the experts' projections"
    for field in ("hidden_size", "moe_intermediate_size"):
        size = getattr(shape, field)
        if size * shape.dtype.itemsize % backend.row_alignment_bytes:
            alignment = backend.row_alignment_bytes
            return f"{field} {size} x {shape.dtype.itemsize} bytes is not a multiple of {alignment} bytes"
    return backend.missing()


def require_known(name: str) -> None:
    """Raises UsageError unless `name` is `auto` or a backend."""
    if name != "auto" and name not in BACKENDS:
        raise UsageError(f"unknown backend '{name}'; choose auto, {', '.join(BACKENDS)}")


def pick(name: str, shape: ExpertShape) -> str:
    """The backend to use: `name` itself, or for `auto` the first that accepts the shape.

    Raises:
        UsageError: the name is unknown, or that backend refuses the shape; the alternatives are named.
    """
    if name == "auto":
        return next(candidate for candidate in BACKENDS if refusal(candidate, shape) is None)
    require_known(name)
    reason = refusal(name, shape)
    if reason is not None:
        others = [other for other in BACKENDS if refusal(other, shape) is None]
        raise UsageError(f"backend '{name}' cannot compute this layer: it {reason}; use {' or '.join(others)}")
    return name
