"""Tiny models of both sides: ours for each family, and transformers' own as the oracle."""

from pathlib import Path
from typing import Any

import torch
import transformers

from moesaic.checkpoint.run_state import save_run_state
from moesaic.config import ModelConfig, MoEConfig, TrainConfig
from moesaic.config_io import to_mapping, write_train_config
from moesaic.model.transformer import Transformer
from moesaic.tokenizer import byte_tokenizer

from .family_cases import VOCAB_SIZE


def save_hf_model(config: transformers.PreTrainedConfig, directory: Path) -> transformers.PreTrainedModel:
    """Writes a random model of `config` as transformers does, and returns it."""
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    randomize(model)
    model.save_pretrained(directory)
    return model


@torch.no_grad()
def randomize(model: torch.nn.Module) -> None:
    """Every weight and bias takes part: norms are not 1, biases are not 0, and matrices are large enough to matter."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        module = name.rpartition(".")[0].rpartition(".")[2]  # a whole block may be named after its norms, as in DBRX
        if "norm" in module:
            tensor.normal_(1.0, 0.3)
        elif "bias" in name:
            tensor.normal_(0.0, 0.1)
        elif "inv_freq" not in name:
            tensor.normal_(0.0, 0.2)


def random_tokens() -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, (2, 40))


@torch.no_grad()
def logit_difference(ours: Transformer, theirs: transformers.PreTrainedModel) -> float:
    tokens = random_tokens()
    expected = theirs(tokens).logits
    assert expected.std() > 0.3  # logits that a difference would show in
    return (ours(tokens) - expected).abs().max().item()


def load_theirs(directory: Path) -> transformers.PreTrainedModel:
    """A directory as transformers loads it; every tensor must find its place, and none be missing."""
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    model, report = loaded
    assert not any(report.values()), report
    return model.eval()


BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 40, "max_position_embeddings": 64,
}  # fmt: skip
EXPERTS: dict[str, Any] = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

CONFIGS = {
    "dense": ModelConfig(**BASE, rope_theta=777.0, eos_token_ids=(3,)),
    "dense tied, biased": ModelConfig(
        **BASE, tie_word_embeddings=True, attention_bias=True, attention_output_bias=True, initializer_range=0.0
    ),
    "softmax": ModelConfig(**BASE, moe=MoEConfig(**EXPERTS), eos_token_ids=(3, 4), bos_token_id=2),
    "softmax, dense first": ModelConfig(
        **BASE, moe=MoEConfig(**EXPERTS, first_k_dense_replace=2, norm_topk_prob=False), rms_norm_eps=1e-3
    ),
    "softmax of width 0 outside experts": ModelConfig(**{**BASE, "intermediate_size": 0}, moe=MoEConfig(**EXPERTS)),
    "sigmoid": ModelConfig(**BASE, moe=MoEConfig(**EXPERTS, router="sigmoid_topk", routed_scaling_factor=2.5)),
    "sigmoid, shared, partial rope": ModelConfig(
        **BASE,
        moe=MoEConfig(**EXPERTS, router="sigmoid_topk", n_shared_experts=1, first_k_dense_replace=1),
        partial_rotary_factor=0.5, qk_norm="none", attention_bias=True, tie_word_embeddings=True,
    ),
}  # fmt: skip


def random_model(config: ModelConfig) -> Transformer:
    model = Transformer(config).eval()
    randomize(model)
    return model


def make_run(directory: Path, config: ModelConfig) -> Transformer:
    """A run directory as training leaves it, and its model."""
    directory.mkdir()
    model = random_model(config)
    train_config = TrainConfig(model=config, sequence_length=32)
    write_train_config(train_config, directory / "config.json")
    byte_tokenizer().save(directory)
    extra = {"config": to_mapping(train_config), "tokenizer": byte_tokenizer().fingerprint}
    save_run_state(directory, 1, {f"model.{name}": tensor for name, tensor in model.state_dict().items()}, extra)
    return model
