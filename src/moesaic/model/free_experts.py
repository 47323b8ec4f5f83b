"""Experts that compute next to nothing, among which a router chooses as among the others.

T tokens, N assignments, n of them to constant experts, C constant experts, D hidden size.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from moesaic.config import MoEConfig
from moesaic.ops import Routing


class FreeExperts(nn.Module):
    """The zero-computation experts of MoE++ (arXiv 2410.07348); LongCat-Flash (arXiv 2509.01322) has those that copy.

    After the E experts that compute, a routing numbers the zero experts, whose output is 0, then the copy experts,
    whose output is the token x, then the constant experts: a x + b v with (a, b) = softmax(W x), where each has a
    learned vector v (D) and a learned W (2, D). A row's weight multiplies what comes out, as it does for any expert.
    """

    def __init__(self, hidden_size: int, moe: MoEConfig) -> None:
        super().__init__()
        self.first_copy = moe.num_experts + moe.num_zero_experts
        self.first_constant = self.first_copy + moe.num_copy_experts
        count = moe.num_constant_experts
        self.constants = nn.Parameter(torch.empty(count, hidden_size)) if count else None
        self.mix = nn.Parameter(torch.empty(count, 2, hidden_size)) if count else None

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """x (T, D) -> the sum of what each token's free experts give (T, D), in x's dtype.

        Tokens and constants are multiplied by the sums of their factors; no row of an expert is ever stored.
        """
        is_copy_N = (routing.expert_ids >= self.first_copy) & (routing.expert_ids < self.first_constant)
        of_token_T = routing.weights.new_zeros(len(x))
        of_token_T = of_token_T.index_add(0, routing.token_ids[is_copy_N], routing.weights[is_copy_N])
        if self.constants is None:
            return of_token_T.to(x.dtype).unsqueeze(1) * x

        is_constant_N = routing.expert_ids >= self.first_constant
        token_ids_n = routing.token_ids[is_constant_N]
        constant_ids_n = routing.expert_ids[is_constant_N] - self.first_constant
        weights_n = routing.weights[is_constant_N]
        token_share_n, constant_share_n = self._shares(x[token_ids_n], constant_ids_n).to(weights_n.dtype).unbind(1)
        of_token_T = of_token_T.index_add(0, token_ids_n, weights_n * token_share_n)
        of_constants_TC = weights_n.new_zeros(len(x), len(self.constants))
        places = (token_ids_n, constant_ids_n)  # some twice, where rows of weight 0 fill up an expert's capacity
        of_constants_TC = of_constants_TC.index_put(places, weights_n * constant_share_n, accumulate=True)
        return of_token_T.to(x.dtype).unsqueeze(1) * x + of_constants_TC.to(x.dtype) @ self.constants.to(x.dtype)

    def _shares(self, x: Tensor, constant_ids: Tensor) -> Tensor:
        """x (n, D), the constant expert (n,) of each row -> (n, 2), the shares of the token and of the constant."""
        assert self.mix is not None
        logits_nC2 = functional.linear(x, self.mix.flatten(0, 1)).unflatten(1, (-1, 2))
        logits_n2 = logits_nC2[torch.arange(len(x), device=x.device), constant_ids]
        return logits_n2.softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32))
