"""The decoder, top-down: tokens -> embedding -> blocks (attention, then MoE or MLP) -> norm -> logits.

B batch, L new tokens, S all tokens attended to, D hidden size, V vocabulary.
"""

from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from moesaic.config import ModelConfig
from moesaic.model.attention import Attention
from moesaic.model.initialize import initialize
from moesaic.model.kv_cache import KVCache
from moesaic.model.mlp import MLP
from moesaic.model.moe import MoE
from moesaic.model.norm import RMSNorm
from moesaic.model.rope import rotary_tables
from moesaic.ops import Routing, require_known


class Transformer(nn.Module):
    """A decoder-only language model. The same object trains, generates, serves and is analysed.

    Made under `torch.device("meta")` it takes no memory; its weights are then uninitialised until loaded or
    `init_weights` is called.
    """

    def __init__(self, config: ModelConfig, backend: str = "auto") -> None:
        super().__init__()
        require_known(backend)
        self.config = config
        self.activation_checkpointing = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, index, backend) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def init_weights(self, seed: int = 0) -> None:
        """Fill every parameter and buffer, the same for the same seed."""
        initialize(self, self.config, seed)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        kv: KVCache | None = None,
        *,
        routings: list[Routing] | None = None,
        logits_to_keep: int | None = None,
    ) -> Tensor:
        """tokens (B, L) int64 -> logits (B, L, V).

        Args:
            positions: (B, L) int64, negative for padding; default: consecutive, after what `kv` holds.
            kv: keys and values of earlier tokens; the new ones are added.
            routings: a list that receives the Routing of each MoE layer, in order.
            logits_to_keep: compute logits for this many last tokens of each sequence only.
        """
        implied_positions = positions is None
        if positions is None:
            positions = self._consecutive_positions(tokens, kv)
        starts_empty = kv is None or kv.length == 0
        if kv is not None:
            kv.extend(positions)
        plainly_causal = implied_positions and starts_empty
        attention_mask = None if plainly_causal else _attention_mask(positions, kv)
        padding_mask = None if implied_positions or bool((positions >= 0).all()) else positions >= 0
        rotary = rotary_tables(positions.clamp_min(0), self.config)

        x_BLD = self.embed_tokens(tokens)
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled() and kv is None:
                x_BLD, routing = _checkpointed(block, x_BLD, rotary, attention_mask, padding_mask)
            else:
                x_BLD, routing = block(x_BLD, rotary, attention_mask, padding_mask, kv)
            if routings is not None and routing is not None:
                routings.append(routing)
        if logits_to_keep is not None:
            x_BLD = x_BLD[:, -logits_to_keep:]
        return nn.functional.linear(self.norm(x_BLD), self.head_weight)

    @property
    def head_weight(self) -> Tensor:
        """(V, D): the output projection, which is the embedding when the two are tied."""
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    @property
    def blocks(self) -> list["Block"]:
        return cast(list[Block], list(self.layers))

    @property
    def moe_layers(self) -> list[MoE]:
        return [block.feed_forward for block in self.blocks if isinstance(block.feed_forward, MoE)]

    @staticmethod
    def _consecutive_positions(tokens: Tensor, kv: KVCache | None) -> Tensor:
        steps_L = torch.arange(tokens.shape[1], device=tokens.device)
        if kv is None:
            return steps_L.expand(tokens.shape)
        return kv.next_positions.unsqueeze(1) + steps_L


class Block(nn.Module):
    """Attention, then a feed-forward, each on a normalised copy of the residual stream."""

    def __init__(self, config: ModelConfig, layer_index: int, backend: str) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, layer_index)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = (
            MoE(config, backend)
            if config.is_moe_layer(layer_index)
            else MLP(config.hidden_size, config.intermediate_size)
        )

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        padding_mask: Tensor | None,
        kv: KVCache | None = None,
    ) -> tuple[Tensor, Routing | None]:
        x = x + self.attention(self.attention_norm(x), rotary, attention_mask, kv)
        normed = self.feed_forward_norm(x)
        if isinstance(self.feed_forward, MoE):
            update, routing = self.feed_forward(normed, padding_mask)
        else:
            update, routing = self.feed_forward(normed), None
        return x + update, routing


def _attention_mask(query_positions: Tensor, kv: KVCache | None) -> Tensor:
    """(B, 1, L, S) bool: a query at position p sees the keys at 0..p; padding sees itself, so that no row is empty."""
    key_positions = query_positions if kv is None else kv.positions[:, : kv.length]
    query_BL1, key_B1S = query_positions.unsqueeze(2), key_positions.unsqueeze(1)
    visible_BLS = (key_B1S <= query_BL1) & (key_B1S >= 0)
    padding_BLS = (query_BL1 < 0) & (key_B1S < 0)
    return (visible_BLS | padding_BLS).unsqueeze(1)


def _checkpointed(block: Block, *inputs: object) -> tuple[Tensor, Routing | None]:
    """Recompute the block in the backward pass, but keep the experts that the forward pass chose.

    A recomputed logit may differ in its last bit and flip a near tie; saving the chosen ids rules that out.
    """
    replay_choice = partial(create_selective_checkpoint_contexts, [torch.ops.aten.topk.default])
    return checkpoint(block, *inputs, use_reentrant=False, context_fn=replay_choice)  # type: ignore[no-any-return]
