"""Which parameter is updated by what: AdamW for all, or Muon for the matrices and AdamW for the rest.

E experts, M x N one matrix.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from moesaic.config import OptimizerConfig
from moesaic.ops.native_muon import MatrixStack, muon_step

NEWTON_SCHULZ = 5 * ((3.4445, -4.7750, 2.0315),)
"""(a, b, c) of each iteration."""
FOR_EXPERTS = ((7.9103, -22.0788, 15.8691), (3.6073, -2.6467, 0.5110), (2.6713, -1.9853, 0.4535))
"""The same for a stack of matrices: the composition of quintics closest to 1 for singular values between 0.01 and 1
(Polar Express, arXiv 2505.16932, with its margin of 1 %). Smaller ones stay small: an expert sees few tokens, and they
are mostly noise."""
_NO_MATRICES = (
    "router.weight", "router.noise_weight", "shared_expert_gate.weight", "free_experts.constants", "free_experts.mix",
    "gate_up_bias", "down_bias", "lm_head.weight",
)  # fmt: skip
"""Of two dimensions or more, and yet neither orthogonalised nor decayed: rows that score, and vectors of an expert."""


class Muon(Optimizer):
    """Momentum, orthogonalised by Newton-Schulz (K. Jordan et al., kellerjordan.github.io/posts/muon, 2024).

    Differs from `torch.optim.Muon` in what mixtures of experts need: a parameter may be a stack of matrices
    (..., M, N), each of which is orthogonalised alone, so an expert that saw few tokens moves as far as one that saw
    many, in three iterations instead of five; and they run in the parameter's dtype on CPUs, where bfloat16 is slow.
    The update of an M x N matrix is scaled by 0.2 sqrt(max(M, N)), which gives it the size of an AdamW update (arXiv
    2502.16982). A matrix whose gradient is exactly zero, an expert without tokens, is only decayed; its momentum fades
    meanwhile.

    Stacks move once in `stack_every` steps, so many times as far: in which, a group's `number` of the step tells, see
    `prepare_step`. What an expert learns from the few tokens of a step is noisy, and orthogonalising most of the work.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        stacked: int = 1,
        stack_every: int = 1,
    ) -> None:
        """`stacked` matrices of equal size stand on top of each other in the last two dimensions (2 in `gate_up`)."""
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "stacked": stacked}
        super().__init__(params, {**defaults, "stack_every": stack_every, "number": 0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None, "Muon takes one gradient per step"
        for group in self.param_groups:
            served, others = [], []
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                every = group["stack_every"] if parameter.ndim > 2 else 1
                stack = self._stack(parameter, group, every)
                if (group["number"] + 1) % every:
                    stack.momenta.lerp_(stack.gradients, 1 - group["momentum"])
                else:
                    (served if stack.is_served else others).append(stack)
            if served:
                muon_step(served, momentum=group["momentum"])
            for stack in others:
                _step(stack, group["momentum"])

    def _stack(self, parameter: Tensor, group: Mapping[str, Any], every: int) -> MatrixStack:
        """A step of it, as long as `every` ones."""
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        gradient = parameter.grad
        assert gradient is not None
        rows, columns = parameter.shape[-2] // group["stacked"], parameter.shape[-1]
        return MatrixStack(
            (rows, columns),
            parameter,
            gradient,
            state["momentum"],
            keep=(1 - group["lr"] * group["weight_decay"]) ** every,
            step_size=every * group["lr"] * 0.2 * max(rows, columns) ** 0.5,
            coefficients=FOR_EXPERTS if parameter.ndim > 2 else NEWTON_SCHULZ,
        )


def _step(stack: MatrixStack, momentum: float) -> None:
    """What `muon_step` does, by torch: for large matrices and other devices."""
    stack.momenta.lerp_(stack.gradients, 1 - momentum)
    nesterov = torch.lerp(stack.gradients, stack.momenta, momentum)
    gradients, directions, parameters = (
        each.unflatten(-2, (-1, stack.size[0])) for each in (stack.gradients, nesterov, stack.parameters)
    )
    largest = torch.linalg.vector_norm(gradients, ord=math.inf, dim=(-2, -1), keepdim=True)
    # Orthogonalised, even a faded momentum has full size: an idle expert would drift on. It rests instead.
    update = orthogonalize(directions, stack.coefficients) * (largest != 0)
    parameters.mul_(stack.keep).sub_(update, alpha=stack.step_size)


def orthogonalize(matrices: Tensor, coefficients: Sequence[tuple[float, float, float]] = NEWTON_SCHULZ) -> Tensor:
    """(..., M, N) -> the nearest semi-orthogonal matrices, roughly: singular values end between 0.7 and 1.3.

    But those below a hundredth of the Frobenius norm end smaller with the `coefficients` FOR_EXPERTS, 0 at 0.
    """
    x = matrices.flatten(0, -3) if matrices.ndim > 2 else matrices.unsqueeze(0)
    tall = x.shape[-2] > x.shape[-1]
    x = (x.mT if tall else x).contiguous()
    if x.device.type == "cuda":
        x = x.bfloat16()
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    for a, b, c in coefficients:
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype).reshape(matrices.shape)


def make_optimizers(model: nn.Module, config: OptimizerConfig) -> list[Optimizer]:
    """One AdamW, and one Muon before it when asked for. Each group keeps its peak rate in `peak_lr`."""
    by_role: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            by_role.setdefault(role_of(name, parameter), []).append(parameter)

    def group(role: str, lr: float, weight_decay: float, **options: object) -> list[dict[str, Any]]:
        parameters = by_role.get(role)
        settings = {"lr": lr, "peak_lr": lr, "weight_decay": weight_decay, **options}
        return [{"params": parameters, **settings}] if parameters else []

    muon = config.name == "muon"
    attention_lr, feed_forward_lr = (config.matrix_lr, config.feed_forward_lr) if muon else (config.lr, config.lr)
    decay = config.weight_decay
    matrix_groups = [
        *group("gate_up", feed_forward_lr, decay, **({"stacked": 2} if muon else {})),
        *group("feed_forward", feed_forward_lr, decay),
        *group("attention", attention_lr, decay),
    ]
    other_groups = [
        *group("embedding", config.embedding_lr or config.lr, 0.0),
        *group("other", config.lr, 0.0),
    ]
    adamw = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "fused": True}
    if not muon:
        return [AdamW(matrix_groups + other_groups, **adamw)]
    matrices = Muon(matrix_groups, lr=config.matrix_lr, momentum=config.momentum, stack_every=config.expert_every)
    return [matrices, AdamW(other_groups, **adamw)]


def role_of(name: str, parameter: Tensor) -> str:
    """How a parameter is treated: as gate_up, feed_forward or attention matrix, as embedding, or as other.

    The factors of adapters are others: decay would pull their product, which is small, back to nothing.
    """
    if parameter.ndim == 1 or name.endswith(_NO_MATRICES) or ".parametrizations." in name:
        return "other"
    if name == "embed_tokens.weight":
        return "embedding"
    if name.endswith("experts.gate_up"):
        return "gate_up"
    return "feed_forward" if ".feed_forward." in name else "attention"


def prepare_step(optimizers: list[Optimizer], number: int, factor: float) -> None:
    """Tell every group that step `number`, from 0, comes next, and set its rate to `factor` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["number"], group["lr"] = number, group["peak_lr"] * factor


def optimizer_tensors(optimizers: list[Optimizer], model: nn.Module) -> dict[str, Tensor]:
    """All moments by name, `NAME/MOMENT`, to be saved beside the parameters."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}/{moment}": value
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        for moment, value in state.items()
    }


def load_optimizer_tensors(optimizers: list[Optimizer], model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` returned."""
    parameters = dict(model.named_parameters())
    owner = {
        parameter: optimizer
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for key, value in tensors.items():
        name, moment = key.rsplit("/", 1)
        parameter = parameters[name]
        # AdamW counts its steps in a tensor on the CPU unless it is fused on another device.
        device = parameter.device if moment != "step" or parameter.device.type == "cuda" else value.device
        owner[parameter].state[parameter][moment] = value.to(device)
