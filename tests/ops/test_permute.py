"""Permutation of rows by expert, against plain loops. T tokens, E experts, K per token, D hidden size."""

import torch

from moesaic.ops import Routing
from moesaic.ops.permute import permute, sort_by_expert, unpermute


def random_routing(T: int, E: int, K: int, *, ragged: bool) -> Routing:
    expert_ids = torch.rand(T, E).topk(K).indices
    keep = torch.rand(T, K) < 0.6 if ragged else torch.ones(T, K, dtype=torch.bool)
    token_ids = torch.arange(T)[:, None].expand(T, K)
    return Routing(
        token_ids=token_ids[keep],
        expert_ids=expert_ids[keep],
        weights=torch.rand(int(keep.sum())),
        logits=torch.zeros(T, E),
        num_experts=E,
        top_k=None if ragged else K,
    )


def test_rows_of_an_expert_stand_together_in_token_order() -> None:
    for ragged in (False, True):
        routing = random_routing(23, 6, 3, ragged=ragged)
        permutation = sort_by_expert(routing)
        x = torch.randn(23, 4)
        rows = permute(x, permutation)
        start = 0
        for expert, end in enumerate(permutation.expert_offsets.tolist()):
            tokens = routing.token_ids[routing.expert_ids == expert]
            assert torch.equal(rows[start:end], x[tokens])
            start = end
        assert start == routing.expert_ids.numel()


def test_unpermute_sums_the_rows_of_each_token() -> None:
    for ragged in (False, True):
        routing = random_routing(23, 6, 3, ragged=ragged)
        permutation = sort_by_expert(routing)
        rows = torch.randn(routing.expert_ids.numel(), 4)
        expected = torch.zeros(23, 4)
        for row, token in zip(rows, permutation.token_ids.tolist(), strict=True):
            expected[token] += row
        torch.testing.assert_close(unpermute(rows, permutation), expected)
