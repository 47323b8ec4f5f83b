"""The small operators between a model's products, in C++: for a single token, calling torch costs more than their work.

For inference in float32 on the CPU; `serves` says whether a tensor is such, and whoever asks falls back to torch.

T tokens, side by side of B sequences, M blocks of the longest, H query heads, G key-value heads, d head dim,
D hidden size, E experts, K experts per token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.errors import UsageError
from moesaic.ops.instruction_set import native_module
from moesaic.ops.native import native_instruction_sets
from moesaic.ops.native_call import address, float32, is_plain_call, is_plain_tensor, native, raise_for

FEW_TOKENS = 16
"""Up to so many tokens the calls cost more than the work."""

BLOCK_TOKENS = 32
"""Keys and values lie in blocks of so many tokens; as in csrc/step.h."""
QK_NORMS = {"none": 0, "head": 1, "width": 2}
"""Norms of queries and keys that `attend` knows; names of `ModelConfig.qk_norm`."""
_SCORES = {"softmax": 0, "sigmoid": 1}


def serves(x: Tensor) -> bool:
    """Whether the operators here may take x: float32 on the CPU, without gradients, and nobody is tracing."""
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and is_plain_call(x)
        and not torch.is_autocast_enabled("cpu")
        and native_module() is not None
    )


def ranks(values: Tensor) -> bool:
    """Whether `top_k` takes them: float32 on the CPU, and nobody is tracing."""
    return (
        values.dtype == torch.float32
        and values.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and is_plain_tensor(values)
        and native_module() is not None
    )


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, *, instruction_set: str = "") -> Tensor:
    """x (..., size) / rms(x), times `weight` (size,) where there is one (arXiv 1910.07467)."""
    x = x.contiguous()
    y = torch.empty_like(x)
    size = x.shape[-1]
    rows = x.numel() // size if size else 0
    weight = float32(weight)
    status = native().rms_norm(
        x.data_ptr(), address(weight), rows, size, eps, torch.get_num_threads(), instruction_set, y.data_ptr()
    )
    raise_for(status, instruction_set, native_instruction_sets)
    return y


@dataclass(frozen=True)
class Heads:
    """How projected queries and keys become heads: what a layer's config says of it."""

    num_heads: int
    num_key_value_heads: int
    head_dim: int
    scale: float
    qk_norm: str = "none"
    """`none`; `head` and `width`, before the rotation."""
    norm_eps: float = 1e-6
    interleaved: bool = False
    """Which pairs turn, see `moesaic.model.rope.rotate`."""


@dataclass(frozen=True)
class AttentionStep:
    """What the new queries, keys and values of some sequences meet in a layer; see csrc/step.h."""

    heads: Heads
    keys: Tensor
    """(blocks, G, d, BLOCK_TOKENS): the new ones will be written."""
    values: Tensor
    """(blocks, G, BLOCK_TOKENS, d)."""
    first_tokens: Tensor
    """(B + 1,) int64: where each sequence's new tokens begin, and T."""
    num_keys: Tensor
    """(B,) int64: tokens of each sequence, the new ones, its last, included."""
    block_tables: Tensor
    """(B, M) int64: the blocks of each sequence."""
    first_keys: Tensor | None = None
    """(T,) int64: the first token of its sequence that a token sees; None: the very first."""
    rotary: tuple[Tensor, Tensor] | None = None
    """cos and sin, each (1, 1, T, r)."""
    norms: tuple[Tensor, Tensor] | None = None
    """Weights of the norms of queries and keys, (d,) or (H d,) and (G d,)."""
    sinks: Tensor | None = None
    """(H,), as in `moesaic.model.softmax_attention.attend`."""

    def __post_init__(self) -> None:
        for name in ("rotary", "norms"):
            pair = getattr(self, name)
            if pair is not None:
                object.__setattr__(self, name, tuple(map(float32, pair)))
        object.__setattr__(self, "sinks", float32(self.sinks))

    def described(self, num_tokens: int) -> tuple[object, ...]:
        """As csrc/step_bindings.cpp reads it."""
        heads, (cos, sin), norms = self.heads, self.rotary or (None, None), self.norms or (None, None)
        self._require(num_tokens, cos)
        tables = (self.first_tokens, self.num_keys, self.block_tables)
        return (
            (num_tokens, len(self.num_keys), heads.num_heads, heads.num_key_value_heads, heads.head_dim),
            (QK_NORMS[heads.qk_norm], heads.norm_eps, *map(address, norms)),
            (0 if cos is None else cos.shape[-1], int(heads.interleaved), address(cos), address(sin)),
            (*map(address, tables), self.block_tables.shape[1], address(self.first_keys)),
            (self.keys.data_ptr(), self.values.data_ptr()),
            address(self.sinks),
            heads.scale,
        )

    def _require(self, num_tokens: int, cos: Tensor | None) -> None:
        """That what torch would broadcast, or refuse, is not read beyond its end; what the tables say of the sequences
        whoever made them has checked."""
        angles = num_tokens if cos is None else cos.shape[2]
        seen = num_tokens if self.first_keys is None else len(self.first_keys)
        sequences = {len(self.num_keys), len(self.block_tables), len(self.first_tokens) - 1}
        if {angles, seen} != {num_tokens} or len(sequences) > 1:
            raise UsageError(
                f"{num_tokens} new tokens, angles for {angles}, windows for {seen} and tables of "
                f"{', '.join(map(str, sorted(sequences)))} sequences do not fit together"
            )


def attend(step: AttentionStep, query: Tensor, key: Tensor, value: Tensor, *, instruction_set: str = "") -> Tensor:
    """Normalise and turn new queries and keys, put keys and values into their blocks, attend to each sequence's own.

    query, key, value: (1, T, H d), (1, T, G d), (1, T, G d), as projected -> (1, T, H d).
    """
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    y = torch.empty_like(query)
    status = native().attend(
        step.described(query.shape[1]),
        (query.data_ptr(), key.data_ptr(), value.data_ptr()),
        torch.get_num_threads(),
        instruction_set,
        y.data_ptr(),
    )
    raise_for(status, instruction_set, native_instruction_sets)
    return y


@dataclass(frozen=True)
class RouterStep:
    """A router that takes the best of each token."""

    weight: Tensor
    """(E, D)."""
    top_k: int
    scores: str
    """`softmax` or `sigmoid`."""
    normalise: bool
    """Whether a token's weights are divided by their sum."""
    least_sum: float
    """That the sum is at least."""
    scaling: float
    """Multiplies all weights at last."""
    bias: Tensor | None = None
    """(E,), of the logits."""
    selection_bias: Tensor | None = None
    """(E,), takes part in the choice alone."""

    def __post_init__(self) -> None:
        for name in ("weight", "bias", "selection_bias"):
            object.__setattr__(self, name, float32(getattr(self, name)))

    def described(self) -> tuple[object, ...]:
        """As csrc/step_bindings.cpp reads it."""
        num_experts, hidden_size = self.weight.shape
        return (
            (hidden_size, num_experts, self.top_k),
            (_SCORES[self.scores], int(self.normalise), self.least_sum, self.scaling),
            (self.weight.data_ptr(), address(self.bias), address(self.selection_bias)),
        )


def route(step: RouterStep, x: Tensor, *, instruction_set: str = "") -> tuple[Tensor, Tensor, Tensor]:
    """x (T, D) -> logits (T, E), experts (T, K) int64, weights (T, K).

    A token's experts stand in the descending order of score plus selection bias.
    """
    x = x.contiguous()
    num_tokens, num_experts = len(x), len(step.weight)
    logits_TE, weights_TK = x.new_empty(num_tokens, num_experts), x.new_empty(num_tokens, step.top_k)
    ids_TK = torch.empty(num_tokens, step.top_k, dtype=torch.int64, device="cpu")
    status = native().route(
        step.described(),
        num_tokens,
        x.data_ptr(),
        torch.get_num_threads(),
        instruction_set,
        (logits_TE.data_ptr(), ids_TK.data_ptr(), weights_TK.data_ptr()),
    )
    raise_for(status, instruction_set, native_instruction_sets)
    return logits_TE, ids_TK, weights_TK


def top_k(values: Tensor, k: int, *, instruction_set: str = "") -> Tensor:
    """values (T, E) -> where the k highest of each row stand (T, k) int64, descending, the first of equal ones; NaN
    counts as infinity.

    Several times as fast as torch for rows as short as those of a router. No gradient passes; see `ranks`.
    """
    values = values.contiguous()
    if k > values.shape[1]:
        raise UsageError(f"{k} of {values.shape[1]} values cannot be chosen")
    ids_Tk = torch.empty(len(values), k, dtype=torch.int64, device="cpu")
    status = native().top_k(
        values.data_ptr(), *values.shape, k, torch.get_num_threads(), instruction_set, ids_Tk.data_ptr()
    )
    raise_for(status, instruction_set, native_instruction_sets)
    return ids_Tk
