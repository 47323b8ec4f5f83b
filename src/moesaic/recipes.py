"""The recipe of the demo: twins of equal work per token, trained alike. dev/LOG.md tells how it was found."""

from typing import Literal

from moesaic.config import (
    BalanceConfig,
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    TrainConfig,
)
from moesaic.config_io import from_mapping
from moesaic.presets import PRESETS

DEFAULT_MINUTES = 5.0
"""What the default number of steps takes on two cores, both twins and all else together."""

_STEPS = 900


def demo_config(
    twin: Literal["sparse", "dense"], *, minutes: float = DEFAULT_MINUTES, seed: int = 0, source: str = "stdlib"
) -> TrainConfig:
    """The run of one twin; `minutes` scales its steps, nothing else."""
    model = from_mapping(ModelConfig, PRESETS[f"demo-{twin}"])
    steps = max(10, round(_STEPS * minutes / DEFAULT_MINUTES))
    return TrainConfig(
        model=model,
        data=DataConfig(source=source, tokenizer=f"bpe:{model.vocab_size}"),
        optimizer=OptimizerConfig(
            name="muon",
            lr=0.01,
            embedding_lr=0.03,
            matrix_lr=0.0075,
            feed_forward_lr=0.005625 if model.moe else 0.00375,  # each the best that was found for it
            weight_decay=0.05,
            eps=1e-10,
            gradient_clip=0.0,
        ),
        schedule=ScheduleConfig(warmup_fraction=0.03, decay_fraction=0.8),
        balance=BalanceConfig(bias_update_rate=0.01 if model.moe else 0.0),
        checkpoint=CheckpointConfig(save_every=max(1, steps // 4)),
        steps=steps,
        batch_size=32,
        sequence_length=128,
        seed=seed,
        evaluate_every=max(1, steps // 20),
        evaluation_tokens=32768,
    )
