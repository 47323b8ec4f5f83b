"""The recipe of the demo: twins of equal work per token, trained alike. dev/LOG.md tells how it was found."""

from dataclasses import replace
from typing import Literal

from moesaic.config import (
    BalanceConfig,
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)

DEFAULT_MINUTES = 5.0
"""What the default number of steps takes, both twins together, on two cores."""

_STEPS = 700
_VOCAB_SIZE = 2048


def demo_config(
    twin: Literal["sparse", "dense"], *, minutes: float = DEFAULT_MINUTES, seed: int = 0, source: str = "stdlib"
) -> TrainConfig:
    """The run of one twin; `minutes` scales its steps, nothing else."""
    steps = max(10, round(_STEPS * minutes / DEFAULT_MINUTES))
    model = _DENSE if twin == "dense" else _SPARSE
    return TrainConfig(
        model=model,
        data=DataConfig(source=source, tokenizer=f"bpe:{_VOCAB_SIZE}"),
        optimizer=OptimizerConfig(
            name="muon", lr=0.01, embedding_lr=0.03, matrix_lr=0.0075, feed_forward_lr=0.00375, weight_decay=0.05
        ),
        schedule=ScheduleConfig(warmup_fraction=0.02, decay_fraction=0.8),
        balance=BalanceConfig(bias_update_rate=0.01 if model.moe else 0.0),
        checkpoint=CheckpointConfig(save_every=max(1, steps // 4)),
        steps=steps,
        batch_size=32,
        sequence_length=256,
        seed=seed,
        evaluate_every=max(1, steps // 20),
        evaluation_tokens=32768,
    )


_DENSE = ModelConfig(
    vocab_size=_VOCAB_SIZE,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=16,
    intermediate_size=256,
    max_position_embeddings=1024,
    initializer_range=0.0,
)
_SPARSE = replace(
    _DENSE,
    intermediate_size=0,
    moe=MoEConfig(
        num_experts=32,
        num_experts_per_tok=4,
        moe_intermediate_size=64,
        router="sigmoid_topk",
        routed_scaling_factor=4.0,
    ),
)
