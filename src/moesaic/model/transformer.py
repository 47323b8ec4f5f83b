"""The decoder, top-down: tokens -> embedding -> blocks (attention, then MoE or MLP) -> norm -> logits.

B batch, L new tokens, D hidden size, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moesaic.config import ModelConfig
from moesaic.errors import UsageError
from moesaic.model.attention_context import AttentionContext, make_attention_context
from moesaic.model.block import Block, BlockRouting
from moesaic.model.depth import DepthBlock
from moesaic.model.initialize import initialize
from moesaic.model.kv_cache import KVCache
from moesaic.model.linear import Linear
from moesaic.model.moe import ExpertLayer
from moesaic.model.noise import combine
from moesaic.model.norm import make_norm
from moesaic.model.paged_kv import PagedBatch
from moesaic.model.routing_context import RoutingContext
from moesaic.ops import Choice, Routing, require_known
from moesaic.ops.native_linear import linear


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
        self.layers = nn.ModuleList(
            (DepthBlock if index in config.depth_layers else Block)(config, index, backend)
            for index in range(config.num_hidden_layers)
        )
        self.norm = make_norm(config)
        if not config.tie_word_embeddings:
            self.lm_head: nn.Linear = Linear(config.hidden_size, config.vocab_size, bias=config.lm_head_bias)

    def init_weights(self, seed: int = 0) -> None:
        """Fill every parameter and buffer, the same for the same seed."""
        initialize(self, self.config, seed)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        kv: KVCache | PagedBatch | None = None,
        *,
        routings: list[Routing] | None = None,
        depth_routings: list[Routing] | None = None,
        replay: Sequence[Routing] | None = None,
        noise_keys: Tensor | None = None,
        logits_to_keep: int | Tensor | None = None,
        skip_others: bool = False,
    ) -> Tensor:
        """tokens (B, L) int64 -> logits (B, L, V).

        Args:
            positions: (B, L) int64, negative for padding; default: consecutive, after what `kv` holds.
            kv: keys and values of earlier tokens; the new ones are added. UsageError where routers look ahead. With a
                PagedBatch tokens are (1, T), those of several sequences side by side, which do not see each other.
            routings: a list that receives the Routing of each MoE layer, in order.
            depth_routings: a list that receives a Routing of each block that tokens may pass by, in order: its rows are
                the tokens that the block computes.
            replay: such a list of an earlier pass over as many tokens, whose experts are chosen again and weighed anew.
            noise_keys: (B,) int64, from which routers with noise draw it in training; default: torch's generator.
            logits_to_keep: compute logits for this many last tokens of each row only, or for those numbers (n,).
            skip_others: nor does the last feed-forward compute the others, which its Routing then lacks, unless its
                router has to see all.
        """
        implied_positions = positions is None
        positions = self._positions(tokens, positions, kv)
        plainly_causal = implied_positions and (kv is None or (isinstance(kv, KVCache) and kv.length == 0))
        if isinstance(kv, KVCache):
            self._require_cacheable()
            kv.extend(positions)
        context = make_attention_context(self.config, positions, kv, plainly_causal=plainly_causal)
        kept_n = _numbers(logits_to_keep, tokens.shape[1])
        skips = kept_n is not None and skip_others and replay is None and self._last_tokens_are_independent
        seen_by_layer = self._routing_contexts(
            tokens,
            mask=None if implied_positions or bool((positions >= 0).all()) else positions >= 0,
            noise_keys=None if noise_keys is None else combine(noise_keys.unsqueeze(1), positions),
            recorded=self._recorded_choices(replay, tokens.numel()),
            is_read=routings is not None or depth_routings is not None,
        )

        x_BLD = self._embed(tokens)
        for index, (block, seen) in enumerate(zip(self.blocks, seen_by_layer, strict=True)):
            if skips and index == len(self.layers) - 1:
                x_BLD, routing = block(x_BLD, context, seen, kept_n)
            elif self.activation_checkpointing and torch.is_grad_enabled() and kv is None:
                x_BLD, routing = _checkpointed(block, x_BLD, context, seen)
            else:
                x_BLD, routing = block(x_BLD, context, seen)
            if routings is not None and routing.experts is not None:
                routings.append(routing.experts)
            if depth_routings is not None and routing.depth is not None:
                depth_routings.append(routing.depth)
        if kept_n is not None and not skips:
            x_BLD = x_BLD[:, kept_n]
        return self._logits(self.norm(x_BLD))

    @property
    def head_weight(self) -> Tensor:
        """(V, D): the output projection, which is the embedding when the two are tied. Not of packed models."""
        return self.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    @property
    def blocks(self) -> list[Block]:
        return cast(list[Block], list(self.layers))

    @property
    def moe_layers(self) -> list[ExpertLayer]:
        return [block.feed_forward for block in self.blocks if isinstance(block.feed_forward, ExpertLayer)]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """In evaluation mode, and back to what it was: a model in training would draw noise and drop tokens."""
        if not self.training:  # setting it again visits every module, and decoding asks for each token
            yield
            return
        self.eval()
        try:
            yield
        finally:
            self.train()

    def _embed(self, tokens: Tensor) -> Tensor:
        x_BLD = self.embed_tokens(tokens)
        # Not copied where nothing would change; nor are the logits below, the largest tensor of all.
        return x_BLD if self.config.embedding_multiplier == 1.0 else x_BLD * self.config.embedding_multiplier

    def _logits(self, x: Tensor) -> Tensor:
        # A packed model has a head of its own, also where the two are tied.
        has_head = hasattr(self, "lm_head")
        logits_BLV = self.lm_head(x) if has_head else linear(x, self.embed_tokens.weight)
        return logits_BLV if self.config.logits_scaling == 1.0 else logits_BLV / self.config.logits_scaling

    def _routing_contexts(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None,
        noise_keys: Tensor | None,
        recorded: Mapping[int, tuple[Choice, ...]],
        is_read: bool,
    ) -> list[RoutingContext]:
        """Of each layer; mask and noise_keys (B, L), the keys' noise differs from layer to layer."""
        return [
            RoutingContext(
                tokens=tokens,
                mask=mask,
                noise_keys=None if noise_keys is None else combine(noise_keys, index),
                replay=recorded.get(index),
                is_read=is_read,
            )
            for index in range(self.config.num_hidden_layers)
        ]

    @property
    def _last_tokens_are_independent(self) -> bool:
        """Whether what the last block gives a token depends on no other token's experts."""
        last = self.config.num_hidden_layers - 1
        return not self.training and not self.config.looks_ahead and last not in self.config.depth_layers

    def _recorded_choices(self, replay: Sequence[Routing] | None, num_tokens: int) -> dict[int, tuple[Choice, ...]]:
        """By layer, what its router is to choose."""
        if replay is None:
            return {}
        self._require_replayable()
        sparse = [index for index, block in enumerate(self.blocks) if isinstance(block.feed_forward, ExpertLayer)]
        sizes = {routing.num_tokens for routing in replay}
        if len(replay) != len(sparse) or sizes - {num_tokens}:
            raise UsageError(
                f"the recorded routing has {len(replay)} layers of {', '.join(map(str, sorted(sizes)))} tokens, and "
                f"this pass {len(sparse)} layers of {num_tokens}; replay it on the tokens that it was recorded from"
            )
        for layer, routing in zip(self.moe_layers, replay, strict=True):
            if routing.num_experts != layer.router.num_experts:
                raise UsageError(
                    f"the recorded routing chooses among {routing.num_experts} experts, and this model among "
                    f"{layer.router.num_experts}; replay it on a model that has as many"
                )
        return {index: (routing.decision,) for index, routing in zip(sparse, replay, strict=True)}

    def _require_cacheable(self) -> None:
        if self.config.looks_ahead:
            assert self.config.moe is not None
            raise UsageError(
                f"the router {self.config.moe.router} looks at later tokens, which a cache does not have; compute the "
                "whole text without one"
            )

    def _require_replayable(self) -> None:
        if self.config.moe is not None and self.config.moe.router == "soft":
            raise UsageError("the router soft chooses no experts, so that nothing can be replayed; pass no replay")
        if self.config.depth_layers:
            raise UsageError(
                f"tokens may pass by layers {', '.join(map(str, self.config.depth_layers))} (depth_layers), and a "
                "recorded routing of experts does not tell which did; pass no replay"
            )

    @staticmethod
    def _positions(tokens: Tensor, given: Tensor | None, kv: KVCache | PagedBatch | None) -> Tensor:
        """(B, L): those given, or else consecutive ones, after what `kv` holds."""
        if isinstance(kv, PagedBatch):
            kv.require(tokens, positions_are_given=given is not None)
            return kv.positions
        if given is not None and given.shape != tokens.shape:
            raise UsageError(f"positions are {tuple(given.shape)}, and tokens {tuple(tokens.shape)}")
        if given is not None:
            return given
        steps_L = torch.arange(tokens.shape[1], device=tokens.device)
        return steps_L.expand(tokens.shape) if kv is None else kv.next_positions.unsqueeze(1) + steps_L


def _numbers(kept: int | Tensor | None, length: int) -> Tensor | None:
    """(n,) int64: which of so many tokens are kept, those numbers or the last ones. None: all."""
    if kept is None:
        return None
    if isinstance(kept, int):
        return torch.arange(max(length - kept, 0), length)
    if kept.device.type == "cpu" and len(kept) and not 0 <= int(kept.min()) <= int(kept.max()) < length:
        raise UsageError(f"logits of tokens {int(kept.min())} to {int(kept.max())} are to be kept, of {length}")
    return kept.contiguous()


def _checkpointed(
    block: Block, x: Tensor, context: AttentionContext, seen: RoutingContext
) -> tuple[Tensor, BlockRouting]:
    """Recompute the block in the backward pass, with the choices that its routers made in the forward pass.

    A recomputed logit may differ in its last bit and flip a near tie; handing the choices in again rules that out.
    """
    made: list[BlockRouting] = []

    def run(x: Tensor) -> tuple[Tensor, BlockRouting]:
        y, routing = block(x, context, replace(seen, replay=made[0].decisions) if made else seen)
        if not made:
            made.append(replace(routing, experts=None, depth=None))
        return y, routing

    return checkpoint(run, x, use_reentrant=False)  # type: ignore[no-any-return]
