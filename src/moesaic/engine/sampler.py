"""Drawing the next token from logits, and telling how likely tokens were.

L positions, N texts, V vocabulary.
"""

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from moesaic.config import SamplingConfig
from moesaic.engine.request import Logprob
from moesaic.errors import MoesaicError, UsageError

if TYPE_CHECKING:
    from moesaic.engine.constraint import Constraint

_NOT_NUMBERS = "the model's logits are not numbers: its weights are damaged, or overflow its dtype"
_LARGEST = float(np.finfo(np.float32).max)
_BINS = 1024
_DEEPEST = 40.0
"""Below the best logit; what is further down has less than 1e-17 of its probability, and shares the last bin."""
_SHALLOWEST = 1e-6
_CHUNK = 2**20
"""Numbers that are turned into log-probabilities at a time."""


class Sampler:
    """Draws the tokens of one text.

    The i-th token is a function of the seed, i, the logits and the tokens before it, so it is the same whatever else is
    computed in the same step, and whether it was guessed first or not. Equal logits rank by token id, lower ones first.
    """

    def __init__(self, config: SamplingConfig, prompt_ids: Sequence[int], eos_ids: Collection[int] = ()) -> None:
        self.config = config
        self._eos_ids = sorted(eos_ids)
        self._bias_ids = np.fromiter(config.logit_bias.keys(), np.int64)
        self._bias = np.fromiter(config.logit_bias.values(), np.float64)
        for token_id, bias in config.logit_bias.items():
            if token_id < 0 or not bias < math.inf:
                raise UsageError(f"logit_bias of token {token_id} is {bias}; it needs an id from 0 and a finite number")
        self._repeats = config.repetition_penalty != 1.0
        self._counts = bool(config.presence_penalty or config.frequency_penalty)
        self._adjusts = self._repeats or self._counts or bool(config.logit_bias)
        self._used = _UsedTokens(prompt_ids if self._repeats else ())

    @property
    def is_plain_greedy(self) -> bool:
        """Whether every draw without a constraint is the token of the highest logit, as `greedy_batch` finds it."""
        return self.config.temperature == 0 and not self._adjusts

    def accept(self, token_id: int) -> None:
        """Make `token_id` part of the text, which the penalties look at."""
        if self._repeats or self._counts:
            self._used.add(token_id)

    def draw(self, logits: Tensor, index: int, constraint: "Constraint | None" = None) -> int:
        """logits (V,) of any device and dtype -> the id of generated token number `index`, counted from 0.

        Changes nothing; temperature 0 takes the most likely token. Raises MoesaicError for NaN, and when no token is
        allowed.
        """
        row_V = _float32(logits)
        if self._adjusts or constraint is not None:
            row_V = self._adjusted(row_V, constraint)
        best = int(row_V.argmax())  # NaN counts as the highest
        if not math.isfinite(row_V[best]):
            if row_V[best] == -math.inf and (self._adjusts or constraint is not None):
                raise MoesaicError(
                    f"none of the {row_V.size} tokens is allowed next: logit_bias and the constraint rule out all of "
                    "them; loosen one of the two"
                )
            raise MoesaicError(_NOT_NUMBERS)
        if self.config.temperature == 0:
            return best
        ids, weights = candidates(row_V, self.config)
        # torch adds up in order as numpy does, and three times as fast.
        mass = torch.from_numpy(weights).cumsum(0).numpy()
        return int(ids[mass.searchsorted(_uniform(self.config.seed, index) * mass[-1], side="right")])

    def _adjusted(self, row: np.ndarray, constraint: "Constraint | None") -> np.ndarray:
        """A copy of `row` (V,) with logit_bias, penalties and the constraint."""
        row_V, config, used = row.copy(), self.config, self._used
        if self._bias_ids.size:
            if self._bias_ids.max() >= row_V.size:
                raise UsageError(
                    f"logit_bias has token {self._bias_ids.max()}; the model has tokens below {row_V.size}"
                )
            biased = row_V[self._bias_ids] + self._bias
            row_V[self._bias_ids] = np.where(np.isfinite(biased), _finite32(biased), biased)
        if self._repeats:
            logits, penalty = row_V[used.ids].astype(np.float64), config.repetition_penalty
            with np.errstate(over="ignore"):
                penalised = np.where(logits > 0, logits / penalty, logits * penalty)
            row_V[used.ids] = np.where(np.isfinite(logits), _finite32(penalised), logits)
        if self._counts:
            row_V[used.ids] -= config.presence_penalty * (used.counts > 0) + config.frequency_penalty * used.counts
        if constraint is not None:
            row_V += self._forbidden(constraint, row_V.size)
        return row_V

    def _forbidden(self, constraint: "Constraint", vocab_size: int) -> np.ndarray:
        """(V,): -inf where the constraint allows no token, else 0."""
        bias_V = torch.zeros(vocab_size)
        if constraint.finished and self._eos_ids:
            bias_V.fill_(-math.inf)
            bias_V[self._eos_ids] = 0.0
        else:
            constraint.mask(bias_V)
        return bias_V.numpy()


class _UsedTokens:
    """The different tokens of a text, in the order of their first use, and how often each was generated."""

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        self.ids = np.unique(np.asarray(prompt_ids, dtype=np.int64))
        self.counts = np.zeros(self.ids.size, np.float32)
        self._places = {token_id: place for place, token_id in enumerate(self.ids.tolist())}

    def add(self, token_id: int) -> None:
        place = self._places.setdefault(token_id, self.ids.size)
        if place == self.ids.size:
            self.ids = np.append(self.ids, token_id)
            self.counts = np.append(self.counts, np.float32(0))
        self.counts[place] += 1


def greedy_batch(logits: Tensor) -> list[int | None]:
    """logits (N, V) -> the most likely token of each row; None where `Sampler.draw` refuses the row."""
    if logits.device.type == "cpu":
        rows_NV = _float32(logits)  # numpy finds the highest many times as fast as torch on a CPU
        ids_N = rows_NV.argmax(-1)
        refused_N = ~np.isfinite(rows_NV[np.arange(len(ids_N)), ids_N])
        return [None if refused else token_id for token_id, refused in zip(ids_N.tolist(), refused_N, strict=True)]
    best_N, ids_N = logits.max(-1)
    return [None if token_id < 0 else token_id for token_id in ids_N.where(best_N.isfinite(), -1).tolist()]


def candidates(logits: np.ndarray, config: SamplingConfig) -> tuple[np.ndarray, np.ndarray]:
    """The ids that top_k, then top_p of what it left, then min_p keep of logits (V,), and weights in proportion to
    their probabilities (float64)."""
    ids = _most_likely(logits, config.top_k) if 0 < config.top_k < logits.size else None
    with np.errstate(over="ignore"):  # tiny temperatures
        depths = (logits if ids is None else logits[ids]).astype(np.float64)
        depths -= depths.max()
        depths /= config.temperature
    if config.top_p < 1:
        kept = _nucleus(depths, config.top_p)
        ids, depths = kept if ids is None else ids[kept], depths[kept]
    if config.min_p > 0:
        kept = np.flatnonzero(depths >= math.log(config.min_p))
        ids, depths = kept if ids is None else ids[kept], depths[kept]
    return np.arange(logits.size) if ids is None else ids, np.exp(depths)


def _most_likely(logits: np.ndarray, count: int) -> np.ndarray:
    """The `count` best of logits (V,), in ascending order of id."""
    least = torch.from_numpy(logits).topk(count, sorted=False).values.min().item()
    kept_V = logits > least
    kept_V[np.flatnonzero(logits == least)[: count - np.count_nonzero(kept_V)]] = True
    return np.flatnonzero(kept_V)


def _nucleus(depths: np.ndarray, top_p: float) -> np.ndarray:
    """Where the fewest most likely tokens are that hold `top_p` of the mass (arXiv 1904.09751), in ascending order.

    depths (V,) are tempered logits less the highest. Instead of sorting them all, their masses are added up in bins of
    similar depth, and only the bin in which the nucleus ends is sorted.
    """
    weights_V = np.exp(depths)
    deepest = min(max(-float(depths.min()), _SHALLOWEST), _DEEPEST)
    bins_V = np.minimum(depths * (-(_BINS - 1) / deepest), _BINS - 1).astype(np.intp)
    mass = np.cumsum(np.bincount(bins_V, weights_V, _BINS))
    limit = top_p * mass[-1]
    last = int(mass.searchsorted(limit))
    kept_V = bins_V < last
    ends = np.flatnonzero(bins_V == last)
    ends = ends[np.argsort(-depths[ends], kind="stable")]
    before = np.cumsum(weights_V[ends]) - weights_V[ends] + (mass[last - 1] if last else 0.0)
    kept_V[ends[before < limit]] = True
    return np.flatnonzero(kept_V)


def logprob(logits: Tensor, token_id: int, num_top: int) -> Logprob:
    """Of `token_id` after logits (V,), with the `num_top` most likely tokens."""
    return logprobs(logits[None], [token_id], num_top)[0]


def logprobs(logits: Tensor, token_ids: Sequence[int], num_top: int) -> list[Logprob]:
    """The same for logits (L, V) and one token for each position. Raises MoesaicError for NaN."""
    rows = max(1, _CHUNK // logits.shape[-1])
    found: list[Logprob] = []
    for start in range(0, len(token_ids), rows):
        chunk_LV = logits[start : start + rows].detach().float().log_softmax(-1)
        ids_L = torch.tensor(token_ids[start : start + rows], device=logits.device)
        values = chunk_LV.gather(-1, ids_L[:, None])[:, 0].tolist()
        if any(math.isnan(value) for value in values):
            raise MoesaicError(_NOT_NUMBERS)
        tops = _top(chunk_LV, num_top) if num_top else [()] * len(values)
        found += [Logprob(value, top) for value, top in zip(values, tops, strict=True)]
    return found


def _top(logprobs: Tensor, count: int) -> list[tuple[tuple[int, float], ...]]:
    """For each row of (L, V) the `count` most likely tokens, best first; equal ones by their ids."""
    least_L1 = logprobs.topk(min(count, logprobs.shape[-1]), sorted=False).values.amin(-1, keepdim=True)
    places_L, ids_L = (logprobs >= least_L1).nonzero(as_tuple=True)  # more than `count` where some are equal
    values_L = logprobs[places_L, ids_L].tolist()
    rows: list[list[tuple[int, float]]] = [[] for _ in range(logprobs.shape[0])]
    for place, token_id, value in zip(places_L.tolist(), ids_L.tolist(), values_L, strict=True):
        rows[place].append((token_id, value))
    return [tuple(sorted(row, key=lambda entry: -entry[1])[:count]) for row in rows]


def _uniform(seed: int, index: int) -> float:
    """A number in [0, 1), a function of its arguments alone."""
    return (int(np.random.Philox(key=seed, counter=index).random_raw()) >> 11) * 2.0**-53


def _float32(logits: Tensor) -> np.ndarray:
    """On the CPU; shares memory with `logits` where it can."""
    return logits.detach().cpu().float().numpy()


def _finite32(values: np.ndarray) -> np.ndarray:
    """As near as float32 has finite numbers: an extreme penalty is no reason to call the logits damaged."""
    return np.clip(values, -_LARGEST, _LARGEST)
