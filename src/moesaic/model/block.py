"""One layer of the decoder: attention, then a feed-forward, each beside the residual stream.

B batch, L new tokens, R of them that go on after attention, D hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moesaic.config import ModelConfig
from moesaic.model.attention import Attention
from moesaic.model.attention_context import AttentionContext
from moesaic.model.block_step import block_step, routing_of_step
from moesaic.model.latent_attention import LatentAttention
from moesaic.model.mlp import MLP
from moesaic.model.moe import ExpertLayer, MoE
from moesaic.model.norm import LayerNorm, RMSNorm, make_norm
from moesaic.model.routing_context import RoutingContext
from moesaic.model.soft_moe import SoftMoE
from moesaic.ops import Choice, Routing


@dataclass(frozen=True)
class BlockRouting:
    """What the routers of one block decided."""

    experts: Routing | None = None
    """Of the feed-forward, if that is a layer of experts."""
    depth: Routing | None = None
    """Which tokens the block computed, if some may pass it by."""
    decisions: tuple[Choice, ...] = ()
    """What to hand in as `RoutingContext.replay`, so that the same is decided again."""


class Block(nn.Module):
    """Attention, then a feed-forward; each adds to the residual stream, its input or its output normalised."""

    def __init__(self, config: ModelConfig, layer_index: int, backend: str) -> None:
        super().__init__()
        self.norm_placement = config.norm_placement
        self.residual_multiplier = config.residual_multiplier
        self.attention_norm = make_norm(config)
        self.attention = LatentAttention(config, layer_index) if config.mla else Attention(config, layer_index)
        self.feed_forward_norm = make_norm(config)
        self.feed_forward = make_feed_forward(config, layer_index, backend)

    def forward(
        self, x: Tensor, context: AttentionContext, seen: RoutingContext, kept: Tensor | None = None
    ) -> tuple[Tensor, BlockRouting]:
        """x (B, L, D) -> (B, L, D), or (B, R, D) where the tokens `kept` (R,) alone go on after attention.

        `seen` is what routers may know, of all L tokens.
        """
        step = block_step(self, x, context, seen, kept)
        if step is not None:
            y, *routed = step(x)
            return y, BlockRouting(routing_of_step(self, *routed) if seen.is_read else None)
        update = self.attention(self._input(x, self.attention_norm), context)
        x = self._add(x, update, self.attention_norm)
        if kept is not None:
            x, seen = x[:, kept], seen.of_tokens(kept)
        update, routing = self._feed_forward(self._input(x, self.feed_forward_norm), seen)
        return self._add(x, update, self.feed_forward_norm), routing

    def _feed_forward(self, x: Tensor, seen: RoutingContext) -> tuple[Tensor, BlockRouting]:
        if not isinstance(self.feed_forward, ExpertLayer):
            return self.feed_forward(x), BlockRouting()
        y, routing = self.feed_forward(x, seen)
        chooses = isinstance(self.feed_forward, MoE)
        return y, BlockRouting(experts=routing, decisions=(routing.decision,) if chooses else ())

    def _input(self, x: Tensor, norm: RMSNorm | LayerNorm) -> Tensor:
        return norm(x) if self.norm_placement == "pre" else x

    def _add(self, x: Tensor, update: Tensor, norm: RMSNorm | LayerNorm) -> Tensor:
        if self.norm_placement == "post":
            update = norm(update)
        return torch.add(x, update, alpha=self.residual_multiplier)


def make_feed_forward(config: ModelConfig, layer_index: int, backend: str) -> ExpertLayer | MLP:
    """What `config` says layer number `layer_index` has."""
    if not config.is_moe_layer(layer_index):
        return MLP(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
    assert config.moe is not None
    return SoftMoE(config, backend) if config.moe.router == "soft" else MoE(config, backend)
