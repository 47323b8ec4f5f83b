"""Balanced assignments of tokens to experts, each sequence for itself.

B sequences, L positions, M = L + 1 rows, E experts, K experts per token, C places per expert, A rows that bid, n tokens
of a sequence. Positions without a token get nothing and change nothing.
"""

import torch
from torch import Tensor

ITERATIONS = 8
GAP = 1 / 256
ROUNDS = 256
_FAR = 64.0
_TEMPERATURE = 1 / 32


def sinkhorn_potentials(logits: Tensor, mask: Tensor, iterations: int = ITERATIONS) -> Tensor:
    """logits (B, L, E), mask (B, L), False where there is no token -> what to add to the logits of each expert (B, E),
    so that after a softmax over the experts every expert has n / E of its sequence's n tokens.

    Sinkhorn's alternation of rows and columns, on logarithms. After 8 iterations on logits of order 1, and n of several
    times E, all columns are within 2 % of n / E; where logits differ by far more than 1 they can miss it by half.
    """
    potentials_BE = logits.new_zeros(logits.shape[0], logits.shape[2])
    nothing_B1 = ~mask.any(1, keepdim=True)
    for _ in range(iterations):
        scores_BLE = logits + potentials_BE.unsqueeze(1)
        scores_BLE = scores_BLE - scores_BLE.logsumexp(-1, keepdim=True)
        sums_BE = scores_BLE.masked_fill(~mask.unsqueeze(-1), -torch.inf).logsumexp(1)
        sums_BE = sums_BE.masked_fill(nothing_B1, 0.0)
        potentials_BE = potentials_BE - sums_BE + sums_BE.mean(-1, keepdim=True)
    return potentials_BE


def balanced_assignment(logits: Tensor, mask: Tensor, top_k: int, rounds: int = ROUNDS) -> Tensor:
    """logits (B, L, E), mask (B, L), False where there is no token -> (B, L, E), True where a token goes to an expert:
    K distinct experts for each of a sequence's n tokens, n K / E tokens, rounded down or up, for each expert, of a
    nearly maximal sum of logits.

    An auction (Bertsekas): tokens bid for the experts that are worth most to them at the present prices, as much as
    makes them indifferent to their next best one, and GAP of the sequence's range of logits more; each expert keeps the
    C highest bids, and its price is the lowest of them. If all tokens find their places within the rounds, the sum is
    at most GAP x that range x E C below the greatest possible, with C places at each of the E experts. What is left
    else, mostly a few rows, takes the best place that is free, or that one exchange frees: the balance holds all the
    same, but the bound no longer. Logits more than 64 below a token's best one count as 64 below it.
    """
    _, length, num_experts = logits.shape
    if top_k == num_experts or logits.numel() == 0:
        return mask.unsqueeze(-1).expand(logits.shape)
    auction = _Auction(logits, mask, top_k)
    for _ in range(rounds):
        if not auction.round():
            break
    for sequence, row in auction.need().nonzero().tolist():
        auction.place(sequence, row)
    return auction.is_held()[:, :length]


class _Auction:
    """Row L of each sequence is the token that takes the places which the others leave; all places are taken then."""

    def __init__(self, logits: Tensor, mask: Tensor, top_k: int) -> None:
        batch_size, length, num_experts = logits.shape
        rows_B = mask.sum(1) * top_k
        worth_BLE = (logits - logits.amax(-1, keepdim=True)).clamp_min(-_FAR).masked_fill(~mask.unsqueeze(-1), 0.0)
        range_B = -worth_BLE.amin((1, 2)).clamp_max(-1e-12)
        heat_B1 = range_B.unsqueeze(1) * _TEMPERATURE
        potentials_BE = sinkhorn_potentials(worth_BLE / heat_B1.unsqueeze(-1), mask)

        self.worth_BME = torch.nn.functional.pad(worth_BLE, (0, 0, 0, 1))
        self.demand_BM = torch.nn.functional.pad(mask.long() * top_k, (0, 1))
        self.demand_BM[:, -1] = -rows_B % num_experts
        self.capacity_B = (rows_B + num_experts - 1) // num_experts
        self.step_B = range_B * GAP
        # Near the prices at the end, which saves rounds; not equal, or all profits of a lone token would be.
        self.first_price_BE = -0.99 * potentials_BE * heat_B1
        self.price_BE = self.first_price_BE.clone()
        self.bids_BEM = worth_BLE.new_full((batch_size, num_experts, length + 1), -torch.inf)

    def is_held(self) -> Tensor:
        """(B, M, E)."""
        return (self.bids_BEM > -torch.inf).transpose(1, 2)

    def need(self) -> Tensor:
        """(B, M): places that the rows still look for."""
        return self.demand_BM - (self.bids_BEM > -torch.inf).sum(1)

    def round(self) -> bool:
        """All that look for places bid at once. False: nobody does."""
        need_BM = self.need()
        sequence_A, row_A = need_BM.nonzero(as_tuple=True)
        if not len(row_A):
            return False
        need_A1 = need_BM[sequence_A, row_A].unsqueeze(1)
        old_AE = self.bids_BEM[sequence_A, :, row_A]
        worth_AE = self.worth_BME[sequence_A, row_A]
        profit_AE = (worth_AE - self.price_BE[sequence_A]).masked_fill(old_AE > -torch.inf, -torch.inf)
        best = profit_AE.sort(dim=-1, descending=True, stable=True)
        is_among_best_AE = torch.arange(profit_AE.shape[1], device=profit_AE.device) < need_A1
        wants_AE = torch.zeros_like(is_among_best_AE).scatter_(1, best.indices, is_among_best_AE)
        new_AE = worth_AE - best.values.gather(1, need_A1) + self.step_B[sequence_A].unsqueeze(1)
        self.bids_BEM[sequence_A, :, row_A] = torch.where(wants_AE, new_AE, old_AE)

        bidders_BE = torch.zeros_like(self.price_BE).index_add_(0, sequence_A, wants_AE.to(self.price_BE.dtype))
        self._keep_highest(*bidders_BE.nonzero(as_tuple=True))
        return True

    def _keep_highest(self, sequence_ids: Tensor, expert_ids: Tensor) -> None:
        """The experts that got bids keep the C highest, of equal ones the earlier, and set their prices."""
        capacity_A1 = self.capacity_B[sequence_ids].unsqueeze(1)
        ranked = self.bids_BEM[sequence_ids, expert_ids].sort(dim=-1, descending=True, stable=True)
        places_M = torch.arange(ranked.values.shape[1], device=capacity_A1.device)
        highest_AM = ranked.values.masked_fill(places_M >= capacity_A1, -torch.inf)
        self.bids_BEM[sequence_ids, expert_ids] = torch.empty_like(highest_AM).scatter_(1, ranked.indices, highest_AM)
        lowest_A = highest_AM.gather(1, capacity_A1 - 1).squeeze(1)
        first_A = self.first_price_BE[sequence_ids, expert_ids]
        self.price_BE[sequence_ids, expert_ids] = torch.where(lowest_A > -torch.inf, lowest_A, first_A)

    def place(self, sequence: int, row: int) -> None:
        """Gives one row what it still needs.

        If it has all experts with room already, one of them can take another row's place at a full expert that this row
        lacks: the full one has more rows than the one with room, so it has one that the other lacks.
        """
        bids_EM, worth_ME = self.bids_BEM[sequence], self.worth_BME[sequence]
        while int((bids_EM[:, row] > -torch.inf).sum()) < int(self.demand_BM[sequence, row]):
            held_EM = bids_EM > -torch.inf
            has_room_E = held_EM.sum(1) < self.capacity_B[sequence]
            lacks_E = ~held_EM[:, row]
            free_E = has_room_E & lacks_E
            if bool(free_E.any()):
                bids_EM[worth_ME[row].masked_fill(~free_E, -torch.inf).argmax(), row] = 0.0
                continue
            # Row m leaves expert e for expert f, and this row takes its place.
            can_MEe = (held_EM & lacks_E.unsqueeze(1)).T.unsqueeze(2) & (
                ~held_EM & has_room_E.unsqueeze(1)
            ).T.unsqueeze(1)
            gain_MEe = worth_ME[row].view(1, -1, 1) - worth_ME.unsqueeze(2) + worth_ME.unsqueeze(1)
            best = int(gain_MEe.masked_fill(~can_MEe, -torch.inf).argmax())
            other, left, entered = torch.unravel_index(torch.tensor(best), gain_MEe.shape)
            bids_EM[left, other], bids_EM[entered, other], bids_EM[left, row] = -torch.inf, 0.0, 0.0
