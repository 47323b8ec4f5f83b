"""What devices reach of their datasheets, and what each step costs beside its arithmetic.

The numbers were fitted on one half of the published systems of benchmarks/plan.py and judged on the other half;
`python benchmarks/plan.py --fit` finds them anew. They are few on purpose: one for each kind of
work, none for a system.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from moesaic.plan.hardware import Class


@dataclass(frozen=True, kw_only=True)
class TrainingLosses:
    """Of training with well-kept software (Megatron-Core and the like)."""

    gemm: float = 0.67
    """Share of the peak that large products reach."""
    half_width: float = 227.0
    """Width of a matrix (of a device's share of one) at which half of that is reached."""
    scores: float = 0.37
    """The same of attention's scores (FlashAttention, bfloat16)."""
    dense_traffic: float = 61.0
    """Numbers of D that a layer moves through memory for each token, forward and backward, outside of products: norms,
    residuals, activations, rotations."""
    expert_traffic: float = 78.0
    """The same for each of the K rows that a token becomes: permuting, the activation, weighing, and back."""
    memory: float = 0.8
    """Share of the memory bandwidth that such work reaches."""
    link: float = 0.75
    """Share of the bandwidth of links inside a node that collectives reach."""
    network: float = 0.75
    """The same between nodes."""
    exposed: float = 0.58
    """Share of the all-to-all that nothing hides."""
    eight_bit: float = 0.84
    """Share of the gemm efficiency that products of 8 bits keep: factors have to be found and applied."""
    goodput: float = 0.72
    """Share of the time that a run of weeks trains as fast as its steps, by published hours: the rest are restarts,
    evaluations, checkpoints, growing batches and longer sequences."""
    launch: float = 1.4e-4
    """Seconds of a layer and micro-batch that no size makes shorter: kernels are started one by one."""


@dataclass(frozen=True, kw_only=True)
class InferenceLosses:
    """Of one kind of device."""

    memory: float
    """Share of the bandwidth that reading weights reaches."""
    unpacking: float
    """Share of that which is left where scales have scales of their own (llama.cpp's K formats)."""
    layer: float
    """Seconds of a layer that no size makes shorter, for each step of decoding."""
    gemm: float
    """Share of the peak that prefill reaches."""

    def reading(self, precision: str) -> float:
        """Share of the bandwidth that reading weights of this type reaches."""
        return self.memory * (self.unpacking if "_k_" in precision else 1.0)


TRAINING = TrainingLosses()
INFERENCE: Mapping[Class, InferenceLosses] = {
    "datacenter": InferenceLosses(memory=0.80, unpacking=0.85, layer=3.0e-5, gemm=0.5),
    "geforce": InferenceLosses(memory=0.79, unpacking=0.96, layer=2.9e-5, gemm=0.45),
    "apple": InferenceLosses(memory=0.855, unpacking=1.0, layer=1.63e-4, gemm=0.6),
    "unified": InferenceLosses(memory=0.88, unpacking=1.0, layer=7.3e-5, gemm=0.35),
    "cpu": InferenceLosses(memory=0.85, unpacking=0.95, layer=5.0e-5, gemm=0.5),
    "calibrated": InferenceLosses(memory=0.88, unpacking=1.0, layer=1.2e-4, gemm=0.8),
    "server": InferenceLosses(memory=0.41, unpacking=1.0, layer=2.0e-4, gemm=0.3),
}
"""`calibrated` is what a whole model keeps of what single kernels of ours were measured to do: norms, attention's
scores, routing, and rows that are rounded and brought into the order of experts stand beside the products (seen with
one and two layers of OLMoE-1B-7B's shape: 0.74 to 0.89 in prefill). `datacenter` and `cpu`, and all shares of the peak,
rest on no published row here."""
SPREAD: Mapping[str, float] = {"train": 0.25, "prefill": 0.35, "decode": 0.25}
"""How far predictions may be off: about four in five published systems lie within this."""
