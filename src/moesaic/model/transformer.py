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
from moesaic.model.attention_context import AttentionContext, make_attention_context
from moesaic.model.initialize import initialize
from moesaic.model.kv_cache import KVCache
from moesaic.model.latent_attention import LatentAttention
from moesaic.model.mlp import MLP
from moesaic.model.moe import MoE
from moesaic.model.norm import LayerNorm, RMSNorm, make_norm
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
        # From an empty tensor: torch's own initialisation, on the meta device, imports its compiler for a second.
        self.embed_tokens = nn.Embedding.from_pretrained(
            torch.empty(config.vocab_size, config.hidden_size), freeze=False
        )
        self.layers = nn.ModuleList(Block(config, index, backend) for index in range(config.num_hidden_layers))
        self.norm = make_norm(config)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)

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
        plainly_causal = implied_positions and (kv is None or kv.length == 0)
        if kv is not None:
            kv.extend(positions)
        context = make_attention_context(self.config, positions, kv, plainly_causal=plainly_causal)
        padding_mask = None if implied_positions or bool((positions >= 0).all()) else positions >= 0

        x_BLD = self._embed(tokens)
        for block in self.blocks:
            if self.activation_checkpointing and torch.is_grad_enabled() and kv is None:
                x_BLD, routing = _checkpointed(block, x_BLD, context, padding_mask)
            else:
                x_BLD, routing = block(x_BLD, context, padding_mask)
            if routings is not None and routing is not None:
                routings.append(routing)
        if logits_to_keep is not None:
            x_BLD = x_BLD[:, -logits_to_keep:]
        return self._logits(self.norm(x_BLD))

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

    def _embed(self, tokens: Tensor) -> Tensor:
        x_BLD = self.embed_tokens(tokens)
        # Not copied where nothing would change; nor are the logits below, the largest tensor of all.
        return x_BLD if self.config.embedding_multiplier == 1.0 else x_BLD * self.config.embedding_multiplier

    def _logits(self, x: Tensor) -> Tensor:
        bias = None if self.config.tie_word_embeddings else self.lm_head.bias
        logits_BLV = nn.functional.linear(x, self.head_weight, bias)
        return logits_BLV if self.config.logits_scaling == 1.0 else logits_BLV / self.config.logits_scaling

    @staticmethod
    def _consecutive_positions(tokens: Tensor, kv: KVCache | None) -> Tensor:
        steps_L = torch.arange(tokens.shape[1], device=tokens.device)
        if kv is None:
            return steps_L.expand(tokens.shape)
        return kv.next_positions.unsqueeze(1) + steps_L


class Block(nn.Module):
    """Attention, then a feed-forward; each adds to the residual stream, its input or its output normalised."""

    def __init__(self, config: ModelConfig, layer_index: int, backend: str) -> None:
        super().__init__()
        self.norm_placement = config.norm_placement
        self.residual_multiplier = config.residual_multiplier
        self.attention_norm = make_norm(config)
        self.attention = LatentAttention(config, layer_index) if config.mla else Attention(config, layer_index)
        self.feed_forward_norm = make_norm(config)
        self.feed_forward = (
            MoE(config, backend)
            if config.is_moe_layer(layer_index)
            else MLP(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        )

    def forward(
        self, x: Tensor, context: AttentionContext, padding_mask: Tensor | None
    ) -> tuple[Tensor, Routing | None]:
        """x (B, L, D); `padding_mask` (B, L) is False for padding, None when there is none."""
        update = self.attention(self._input(x, self.attention_norm), context)
        x = self._add(x, update, self.attention_norm)
        update, routing = self._feed_forward(self._input(x, self.feed_forward_norm), padding_mask)
        return self._add(x, update, self.feed_forward_norm), routing

    def _feed_forward(self, x: Tensor, padding_mask: Tensor | None) -> tuple[Tensor, Routing | None]:
        if isinstance(self.feed_forward, MoE):
            return self.feed_forward(x, padding_mask)
        return self.feed_forward(x), None

    def _input(self, x: Tensor, norm: RMSNorm | LayerNorm) -> Tensor:
        return norm(x) if self.norm_placement == "pre" else x

    def _add(self, x: Tensor, update: Tensor, norm: RMSNorm | LayerNorm) -> Tensor:
        if self.norm_placement == "post":
            update = norm(update)
        return torch.add(x, update, alpha=self.residual_multiplier)


def _checkpointed(block: Block, *inputs: object) -> tuple[Tensor, Routing | None]:
    """Recompute the block in the backward pass, but keep the experts that the forward pass chose.

    A recomputed logit may differ in its last bit and flip a near tie; saving the chosen ids rules that out.
    """
    replay_choice = partial(create_selective_checkpoint_contexts, [torch.ops.aten.topk.default])
    return checkpoint(block, *inputs, use_reentrant=False, context_fn=replay_choice)  # type: ignore[no-any-return]
