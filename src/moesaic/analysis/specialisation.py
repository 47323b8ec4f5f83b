"""How much a token's label says about its experts: mutual information, and what it would be by chance alone.

The text of a domain hangs together, and so does what a router does with it: tokens side by side are not independent
draws. A baseline that shuffled single tokens would call any topic that lasts a paragraph a specialisation. Here whole
documents, or blocks of neighbouring tokens, change their places, which keeps what hangs together together.

T tokens, N assignments, C labels, E experts, U units, P permutations.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

Rows = tuple[np.ndarray, np.ndarray]
"""Token numbers and experts, each (N,)."""
PERMUTATIONS = 99
SAMPLED_TOKENS = 2**15
"""The baseline, and what is compared with it, come from at most so many tokens, in whole blocks."""
FEWEST_DOCUMENTS = 20
MOST_BLOCK = 256
FEWEST_BLOCKS = 20


@dataclass(frozen=True)
class Information:
    """Between a label and the expert of a row, in bits."""

    bits: float
    """Of all tokens."""
    label_bits: float
    """Entropy of the label: most that the experts could tell."""
    sample_bits: float
    """As `bits`, of the sample that the baseline is of. Few rows in many cells have some bits by chance."""
    chance_bits: float | None
    """Mean over the permutations; None where nothing can change places."""
    z: float | None
    """Standard deviations of the permutations that sample_bits is above chance_bits."""
    p: float | None
    """Share of all orders, the found one among them, that have as much: 0.01 is the least of 99 permutations."""
    unit: str
    """What changed places."""


def mutual_information(counts: np.ndarray) -> float:
    """Counts (C, E) of rows -> bits that the label and the expert of a row tell of each other."""
    total = counts.sum()
    if not total:
        return 0.0
    joint = counts / total
    product = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    return float((joint[seen] * np.log2(joint[seen] / product[seen])).sum())


def entropy_bits(counts: np.ndarray) -> float:
    share = counts[counts > 0] / max(1, counts.sum())
    return float(-(share * np.log2(share)).sum())


def joint_counts(
    labels: np.ndarray, token_ids: np.ndarray, expert_ids: np.ndarray, shape: tuple[int, int]
) -> np.ndarray:
    """Labels (T,), rows (N,) -> (C, E) int64."""
    num_labels, num_experts = shape
    flat_N = labels[token_ids] * num_experts + expert_ids
    return np.bincount(flat_N, minlength=num_labels * num_experts).reshape(shape)


@dataclass(frozen=True)
class Units:
    """Pieces of text that have one label each, such as the documents of a domain, and exchange their labels."""

    of_token: np.ndarray
    """(T,), a number in 0..U-1."""
    number: int
    name: str

    @classmethod
    def of_text(cls, documents: np.ndarray, sequences: np.ndarray) -> "Units":
        """Documents; where these are few, sequences."""
        by_document = len(np.unique(documents)) >= FEWEST_DOCUMENTS
        first_U, unit_T = np.unique(documents if by_document else sequences, return_inverse=True)
        return cls(unit_T, len(first_U), f"{len(first_U):,} {'documents' if by_document else 'sequences'}")


def information_of_units(
    labels: np.ndarray, num_labels: int, rows: Rows, num_experts: int, units: Units, seed: int
) -> tuple[np.ndarray, Information]:
    """Labels (T,) and rows -> counts (C, E), and what the two tell of each other."""
    counts_UE = joint_counts(units.of_token, *rows, (units.number, num_experts))
    label_U = np.zeros(units.number, np.int64)
    label_U[units.of_token] = labels

    def joint(label_U: np.ndarray) -> np.ndarray:
        return (np.arange(num_labels)[:, None] == label_U).astype(np.float64) @ counts_UE

    counts_CE = joint(label_U).astype(np.int64)
    found, by_chance = mutual_information(counts_CE), []
    if len(np.unique(label_U)) > 1:
        generator = np.random.default_rng(seed)
        by_chance = [mutual_information(joint(generator.permutation(label_U))) for _ in range(PERMUTATIONS)]
    return counts_CE, _judged(labels, num_labels, found, found, by_chance, units.name)


@dataclass(frozen=True)
class Blocks:
    """Blocks of neighbouring tokens of a source, of a sample of a trace; what has a label that changes in them."""

    kept: np.ndarray
    """(S,) the sampled tokens, those of a source one after another."""
    starts: Sequence[np.ndarray]
    """Of the blocks of each source, places in the sample."""
    size: int
    turned: bool
    """Whether labels are turned round in their blocks, in the place of exchanging blocks."""

    @classmethod
    def of_text(cls, sources: np.ndarray, *, turned: bool = False) -> "Blocks":
        """Sources (T,). Positions are the same in all sequences, so that exchanging blocks would change nothing: these
        are `turned`."""
        order_T = np.argsort(sources, kind="stable")
        piece_T = np.arange(len(sources)) // MOST_BLOCK
        pieces = int(piece_T[-1]) + 1
        number = min(pieces, SAMPLED_TOKENS // MOST_BLOCK)
        chosen = np.zeros(pieces, bool)
        chosen[np.arange(number) * pieces // number] = True
        kept = order_T[chosen[piece_T]]
        size = max(1, min(MOST_BLOCK, len(kept) // FEWEST_BLOCKS))
        edges = np.concatenate([[0], np.cumsum(np.unique(sources[kept], return_counts=True)[1])])
        starts = [np.arange(low, high - size + 1, size) for low, high in pairwise(edges.tolist())]
        return cls(kept, starts, size, turned)

    @property
    def name(self) -> str:
        turned = ", turned round" if self.turned else ""
        return f"{sum(map(len, self.starts)):,} blocks of {self.size} tokens{turned}"

    def orders(self, seed: int) -> Iterator[np.ndarray]:
        """Whose label (S,) each sampled token gets. A rest of a source that fills no block stays as it is."""
        generator = np.random.default_rng(seed)
        inside = np.arange(self.size)
        can_move = self.size > 1 if self.turned else max(map(len, self.starts), default=0) > 1
        for _ in range(PERMUTATIONS if can_move else 0):
            order_S = np.arange(len(self.kept))
            for start_B in self.starts:
                places = start_B[:, None] + inside
                if self.turned:
                    steps = generator.integers(self.size, size=(len(start_B), 1))
                    order_S[places] = start_B[:, None] + (inside + steps) % self.size
                else:
                    order_S[places] = generator.permutation(start_B)[:, None] + inside
            yield order_S


def information_of_tokens(
    labels: np.ndarray,
    num_labels: int,
    rows: tuple[np.ndarray, np.ndarray],
    num_experts: int,
    blocks: Blocks,
    seed: int,
) -> tuple[np.ndarray, Information]:
    """As `information_of_units`, for labels of single tokens. The baseline keeps each to its domain."""
    token_N, expert_N = rows
    shape = (num_labels, num_experts)
    counts_CE = joint_counts(labels, token_N, expert_N, shape)
    place_T = np.full(len(labels), -1)
    place_T[blocks.kept] = np.arange(len(blocks.kept))
    place_N = place_T[token_N]
    token_S, expert_S = place_N[place_N >= 0], expert_N[place_N >= 0]
    labels_S = labels[blocks.kept]
    found = mutual_information(joint_counts(labels_S, token_S, expert_S, shape))
    by_chance = [
        mutual_information(joint_counts(labels_S[order_S], token_S, expert_S, shape)) for order_S in blocks.orders(seed)
    ]
    bits = mutual_information(counts_CE)
    return counts_CE, _judged(labels, num_labels, bits, found, by_chance, blocks.name)


def _judged(
    labels: np.ndarray, num_labels: int, bits: float, found: float, by_chance: Sequence[float], unit: str
) -> Information:
    least = 1e-12  # what rounding makes of equal numbers
    chance = np.array(by_chance)
    mean, spread = (float(chance.mean()), float(chance.std())) if len(chance) else (None, 0.0)
    return Information(
        bits=bits,
        label_bits=entropy_bits(np.bincount(labels, minlength=num_labels)),
        sample_bits=found,
        chance_bits=mean,
        z=None if mean is None or spread < least else (found - mean) / spread,
        p=None if mean is None else float((1 + (chance >= found - least).sum()) / (1 + len(chance))),
        unit=unit,
    )


def overlap(counts: np.ndarray) -> np.ndarray:
    """Counts (C, E) -> (C, C): what part of their rows two labels send to the same experts, 1 when all."""
    share_CE = counts / np.maximum(1, counts.sum(1, keepdims=True))
    return np.minimum(share_CE[:, None], share_CE[None]).sum(2)
