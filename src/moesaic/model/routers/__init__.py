"""Routers: which experts a token visits, and with what weight. docs/routing.md tells them apart."""

from moesaic.config import ModelConfig
from moesaic.errors import UsageError
from moesaic.model.routers.assignment import BaseRouter, SinkhornRouter
from moesaic.model.routers.base import LinearRouter, Router
from moesaic.model.routers.expert_choice import ExpertChoiceRouter
from moesaic.model.routers.hash import HashRouter
from moesaic.model.routers.threshold import ReLURouter, TopPRouter
from moesaic.model.routers.topk import (
    NoisyTopKRouter,
    SigmoidTopKRouter,
    SoftmaxTopKRouter,
    SparseMixerRouter,
    TopKRouter,
    TopKSigmoidInputRouter,
    TopKSoftmaxRouter,
    limit_to_groups,
)

__all__ = ["ROUTERS", "LinearRouter", "ReLURouter", "Router", "TopKRouter", "limit_to_groups", "make_router"]

ROUTERS: dict[str, type[Router]] = {
    "softmax_topk": SoftmaxTopKRouter,
    "topk_softmax": TopKSoftmaxRouter,
    "sigmoid_topk": SigmoidTopKRouter,
    "topk_sigmoid_input": TopKSigmoidInputRouter,
    "sparsemixer": SparseMixerRouter,
    "noisy_topk": NoisyTopKRouter,
    "softmax_top_p": TopPRouter,
    "relu": ReLURouter,
    "hash": HashRouter,
    "expert_choice": ExpertChoiceRouter,
    "sinkhorn": SinkhornRouter,
    "base": BaseRouter,
}


def make_router(config: ModelConfig) -> Router:
    assert config.moe is not None
    if config.moe.router not in ROUTERS:
        raise UsageError(f"unknown router '{config.moe.router}'; choose {' or '.join(ROUTERS)}")
    return ROUTERS[config.moe.router](config)
