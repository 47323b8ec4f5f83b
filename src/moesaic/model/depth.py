"""Mixture of depths (arXiv 2404.02258): blocks that compute some tokens, while the others pass them by.

B sequences, L positions, T = B x L tokens, P the most tokens that a sequence has computed, E experts, D hidden size.
"""

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from moesaic.config import ModelConfig
from moesaic.model.attention_context import AttentionContext
from moesaic.model.block import Block, BlockRouting
from moesaic.model.routers.capacity import sequence_capacity
from moesaic.model.routing_context import RoutingContext
from moesaic.ops import Choice, Routing


class DepthRouter(nn.Module):
    """Picks tokens by one float32 logit each.

    In training the highest logits of a sequence are picked, `depth_capacity` of its tokens, rounded up; of equal ones
    the earliest. That looks ahead, so a token that is evaluated or generated is picked when its own logit is above 0;
    `depth_loss` teaches the logits to agree. The weight of a picked token is the sigmoid of its logit. (The paper
    multiplies by the logit itself, which says no longer where the threshold lies, and turns an update round below it.)
    """

    looks_ahead: ClassVar[Literal["never", "in training", "always"]] = "in training"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.capacity = config.depth_capacity
        self.weight = nn.Parameter(torch.empty(1, config.hidden_size))

    def forward(self, x: Tensor, context: RoutingContext, *, by_threshold: bool, replay: Choice | None) -> Routing:
        """x (B, L, D) -> the picked tokens as the rows of one expert; logits (T, 1), float64 where x is, else float32.

        `by_threshold` picks as in evaluation; `replay` says what is picked.
        """
        with torch.autocast(x.device.type, enabled=False):
            wide_BLD = x if x.dtype == torch.float64 else x.float()
            if context.mask is not None:  # what padding holds, NaN too, must not reach the router's gradient
                wide_BLD = wide_BLD.masked_fill(~context.mask.unsqueeze(2), 0.0)
            # No matrix product: this gives equal tokens equal bits, so that a tie is a tie however the batch is cut.
            logits_BL = (wide_BLD * self.weight.to(wide_BLD.dtype)).sum(-1)
            if replay is None:
                token_ids_N = self._pick(logits_BL.detach(), context, by_threshold).nonzero().squeeze(1)
            else:
                token_ids_N = replay.token_ids
            weights_N = logits_BL.flatten()[token_ids_N].sigmoid()
        return Routing(
            token_ids=token_ids_N,
            expert_ids=torch.zeros_like(token_ids_N),
            weights=weights_N,
            logits=logits_BL.view(-1, 1),
            num_experts=1,
            top_k=None,
            mask=context.flat_mask,
        )

    def _pick(self, logits: Tensor, context: RoutingContext, by_threshold: bool) -> Tensor:
        """(B, L) -> (T,) bool; never padding."""
        if by_threshold:
            picked_BL = logits > 0
        else:
            candidates_BL = logits if context.mask is None else logits.masked_fill(~context.mask, -torch.inf)
            order_BL = candidates_BL.argsort(dim=1, descending=True, stable=True)
            places_L = torch.arange(order_BL.shape[1], device=order_BL.device)
            rank_BL = torch.empty_like(order_BL).scatter_(1, order_BL, places_L.expand_as(order_BL))
            picked_BL = rank_BL < sequence_capacity(context, self.capacity).unsqueeze(1)
        return (picked_BL if context.mask is None else picked_BL & context.mask).flatten()


class DepthBlock(Block):
    """A block that computes the tokens that its router picks; x + weight x (what the block adds) for these, x for the
    others.

    The picked tokens of a sequence attend to each other only, each turned by its true position. Without a cache they
    are gathered first, so that the others cost nothing. With one, all new tokens are computed and the others hidden:
    they leave no key that a later token sees. Layers of experts in the block route the picked tokens alone.
    """

    def __init__(self, config: ModelConfig, layer_index: int, backend: str) -> None:
        super().__init__(config, layer_index, backend)
        self.config = config
        self.layer_index = layer_index
        self.router = DepthRouter(config)

    def forward(self, x: Tensor, context: AttentionContext, seen: RoutingContext) -> tuple[Tensor, BlockRouting]:
        choice, *of_experts = seen.replay or (None,)
        by_threshold = not self.training or context.kv is not None
        depth = self.router(x, seen, by_threshold=by_threshold, replay=choice)
        picked_BL = picked_tokens(depth).view(seen.tokens.shape)
        weight_T = depth.weights.new_zeros(depth.num_tokens).index_put((depth.token_ids,), depth.weights)

        seen = replace(seen, replay=tuple(of_experts) or None)
        compute = self._gathered if context.kv is None else self._hidden
        update_BLD, inner = compute(x, context, seen, picked_BL)
        y_BLD = x + (weight_T.view(*x.shape[:2], 1) * update_BLD).to(x.dtype)
        return y_BLD, replace(inner, depth=depth, decisions=(depth.decision, *inner.decisions))

    def _gathered(
        self, x: Tensor, context: AttentionContext, seen: RoutingContext, picked: Tensor
    ) -> tuple[Tensor, BlockRouting]:
        """What the block adds to x (B, L, D), without meaning where `picked` (B, L) is False, and its routing, as one
        of all T tokens."""
        counts_B = picked.sum(1)
        counts = counts_B.tolist()
        most = max(1, *counts) if counts else 1  # one at least: not every kernel takes none
        index_BP = (~picked).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
        present_BP = torch.arange(index_BP.shape[1], device=x.device) < counts_B.unsqueeze(1)
        is_ragged = any(count < most for count in counts)
        seen = RoutingContext(
            tokens=seen.tokens.gather(1, index_BP),
            mask=present_BP if is_ragged else None,
            noise_keys=None if seen.noise_keys is None else seen.noise_keys.gather(1, index_BP),
            replay=seen.replay,
        )
        places_BPD = index_BP.unsqueeze(2).expand(-1, -1, x.shape[2])
        x_BPD = x.gather(1, places_BPD)
        y_BPD, inner = super().forward(x_BPD, context.of_tokens(self.config, index_BP, present_BP), seen)
        update_BLD = torch.zeros_like(x).scatter(1, places_BPD, y_BPD - x_BPD)
        if inner.experts is not None:
            inner = replace(inner, experts=_of_whole_pass(inner.experts, index_BP, present_BP, picked))
        return update_BLD, inner

    def _hidden(
        self, x: Tensor, context: AttentionContext, seen: RoutingContext, picked: Tensor
    ) -> tuple[Tensor, BlockRouting]:
        """The same with a cache, which has a slot for every token."""
        context = context.of_layer(self.config, self.layer_index, picked)
        y_BLD, inner = super().forward(x, context, replace(seen, mask=picked))
        return y_BLD - x, inner


def picked_tokens(routing: Routing) -> Tensor:
    """(T,) bool: the tokens that a block computes, from the routing of its `DepthRouter`."""
    picked_T = torch.zeros(routing.num_tokens, dtype=torch.bool, device=routing.token_ids.device)
    return picked_T.index_fill(0, routing.token_ids, True)


def depth_loss(routing: Routing) -> Tensor:
    """Binary cross-entropy between the sigmoid of each token's logit and whether the token was picked in training
    (arXiv 2404.02258, section 3.5): it moves the logits of picked tokens above 0 and those of the others below.

    The sum over the tokens of one block, without padding; divide by their number in the whole batch, however it is cut.
    """
    target_T = picked_tokens(routing).to(routing.logits.dtype)
    loss_T = functional.binary_cross_entropy_with_logits(routing.logits.squeeze(1), target_T, reduction="none")
    return loss_T.sum() if routing.mask is None else loss_T[routing.mask].sum()


def _of_whole_pass(routing: Routing, index: Tensor, present: Tensor, picked: Tensor) -> Routing:
    """A routing of gathered tokens, `index` (B, P) where `present` (B, P), as one of all T tokens, of which those not
    `picked` (B, L) are padding with logits of 0."""
    batch_size, length = picked.shape
    firsts_B1 = torch.arange(batch_size, device=index.device).unsqueeze(1) * length
    tokens_G, present_G = (firsts_B1 + index).flatten(), present.flatten()
    logits_TE = routing.logits.new_zeros(picked.numel(), routing.logits.shape[1])
    choice = routing.choice
    if choice is not None:
        real_N = present_G[choice.token_ids]
        choice = Choice(
            token_ids=tokens_G[choice.token_ids[real_N]],
            expert_ids=choice.expert_ids[real_N],
            top_k=None,
            kept=None if choice.kept is None else choice.kept[real_N],
            asked_ids=None if choice.asked_ids is None else choice.asked_ids[real_N],
        )
    return replace(
        routing,
        token_ids=tokens_G[routing.token_ids],
        logits=logits_TE.index_put((tokens_G[present_G],), routing.logits[present_G]),
        top_k=None,
        mask=picked.flatten(),
        choice=choice,
    )
