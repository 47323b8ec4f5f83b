"""Runs of adapters on a model that transformers made: what they load as, and what is exported of them."""

from pathlib import Path
from typing import Any

import torch
import transformers

from moesaic.checkpoint.adapters import start_values
from moesaic.checkpoint.load import load, load_tokenizer
from moesaic.checkpoint.run_state import newest_run_state
from moesaic.checkpoint.save import export_model
from moesaic.config_io import read_train_config
from moesaic.tokenizer import byte_tokenizer
from moesaic.train.run import run_training
from moesaic.train.screen import Screen

from .helpers import load_theirs, save_hf_model

SIZES: dict[str, Any] = {"head_dim": 16}  # not among the fields that the class declares
CONFIG = transformers.Qwen3MoeConfig(
    **SIZES, vocab_size=257, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=40, max_position_embeddings=64, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24,
    decoder_sparse_step=1, mlp_only_layers=[], norm_topk_prob=True, tie_word_embeddings=False,
)  # fmt: skip


def test_what_transformers_computes_with_the_sums_is_what_we_compute_and_export(tmp_path: Path) -> None:
    theirs = save_hf_model(CONFIG, tmp_path / "base")
    byte_tokenizer().save(tmp_path / "base")
    (tmp_path / "text.txt").write_text("\n\n".join(f"{n} less one is {n - 1}." for n in range(900)))
    values = start_values(str(tmp_path / "base"))
    (tmp_path / "adapt.toml").write_text(
        f'init_from = "{tmp_path / "base"}"\nsteps = 3\nbatch_size = 2\nsequence_length = 32\nevaluation_tokens = 64\n'
        f'[data]\nsource = "{tmp_path / "text.txt"}"\n[optimizer]\nlr = 0.03\n[schedule]\nname = "constant"\n'
        '[lora]\nrank = 3\nalpha = 4.5\ntargets = ["experts", "attention", "router", "lm_head"]\n'
    )
    config = read_train_config(tmp_path / "adapt.toml", [], start_values)
    assert config.model.model_type == "qwen3_moe"
    assert config.data.tokenizer == values["tokenizer"] == str(tmp_path / "base")
    trainer = run_training(config, tmp_path / "run", Screen(live=False))

    factors = newest_run_state(tmp_path / "run").load_tensors("model")

    @torch.no_grad()
    def add(weight: torch.Tensor, ours: str) -> None:
        module, _, leaf = ours.rpartition(".")
        name = f"{module}.parametrizations.{leaf}.0"
        weight += 4.5 / 3 * factors.pop(f"{name}.B") @ factors.pop(f"{name}.A")

    before = theirs(torch.arange(40)[None]).logits
    add(theirs.lm_head.weight, "lm_head.weight")
    for number, layer in enumerate(theirs.model.layers):
        for leaf in ("q_proj", "k_proj", "v_proj", "o_proj"):
            add(layer.self_attn.get_parameter(f"{leaf}.weight"), f"layers.{number}.attention.{leaf}.weight")
        add(layer.mlp.gate.weight, f"layers.{number}.feed_forward.router.weight")
        add(layer.mlp.experts.gate_up_proj, f"layers.{number}.feed_forward.experts.gate_up")
        add(layer.mlp.experts.down_proj, f"layers.{number}.feed_forward.experts.down")
    assert not factors

    ids_BL = torch.randint(0, 257, (2, 40))
    expected = theirs(ids_BL).logits
    assert float((theirs(torch.arange(40)[None]).logits - before).detach().abs().max()) > 0.1
    adapted, merged = trainer.model.eval(), load(tmp_path / "run")
    assert export_model(merged, load_tokenizer(tmp_path / "run"), tmp_path / "exported") == "qwen3_moe"
    exported = load_theirs(tmp_path / "exported")
    for logits in (adapted(ids_BL), merged(ids_BL), exported(ids_BL).logits, load(tmp_path / "exported")(ids_BL)):
        torch.testing.assert_close(logits, expected, rtol=0, atol=2e-4 * float(expected.detach().std()))
