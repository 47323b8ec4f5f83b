"""Which blocks are one call into C++ where texts are generated, and what that call reads.

T new tokens of all sequences, D hidden size.
"""

from typing import TYPE_CHECKING

from torch import Tensor

from moesaic.model.attention import Attention, has_hooks
from moesaic.model.attention_context import AttentionContext
from moesaic.model.moe import MoE
from moesaic.model.norm import RMSNorm
from moesaic.model.packed_linear import PackedLinear
from moesaic.model.paged_kv import PagedBatch
from moesaic.model.routers.topk import ScoreTopKRouter
from moesaic.model.routing_context import RoutingContext
from moesaic.ops import Routing, native_step
from moesaic.ops.native_block import BlockStep

if TYPE_CHECKING:
    from moesaic.model.block import Block


def block_step(
    block: "Block", x: Tensor, context: AttentionContext, seen: RoutingContext, kept: Tensor | None
) -> BlockStep | None:
    """For x (1, T, D): the whole block as one operator, or None where its parts have to be called one by one.

    They have to where anybody may look at what is between them, through hooks.
    """
    kv = context.kv
    attention, moe = block.attention, block.feed_forward
    if not isinstance(kv, PagedBatch) or not native_step.serves(x):
        return None
    if not isinstance(attention, Attention) or not isinstance(moe, MoE) or not isinstance(moe.router, ScoreTopKRouter):
        return None
    norms = (block.attention_norm, block.feed_forward_norm)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    if not (
        block.norm_placement == "pre"
        and all(isinstance(norm, RMSNorm) for norm in norms)
        and all(isinstance(projection, PackedLinear) for projection in projections)
        and attention.native_places(context)
        and moe.router.native_serves(x.flatten(0, 1), seen)
        and moe.is_plainly_packed
        and not any(map(has_hooks, (*norms, *projections, attention, moe, moe.router, moe.experts)))
    ):
        return None
    linears = [(each.packed, each.bias) for each in projections if isinstance(each, PackedLinear)]
    return BlockStep(
        norms[0].weight,
        norms[1].weight,
        norms[0].eps,
        block.residual_multiplier,
        *linears,
        attention=attention.step(context, kv),
        router=moe.router.step(),
        experts=moe.experts.store or moe.experts.weights(x.dtype),
        kept=kept,
    )


def routing_of_step(block: "Block", logits: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Routing:
    """What such a call says of its router."""
    moe = block.feed_forward
    assert isinstance(moe, MoE)
    assert isinstance(moe.router, ScoreTopKRouter)
    return moe.router.routing_of(logits, topk_ids, topk_weights)
