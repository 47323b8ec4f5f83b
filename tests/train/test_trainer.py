"""The training loop: accumulation, skipped updates, resume, records. E experts, M mixture-of-experts layers."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moesaic.checkpoint.run_state import newest_run_state
from moesaic.config import (
    BalanceConfig,
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    MoEConfig,
    OptimizerConfig,
    TrainConfig,
)
from moesaic.errors import MoesaicError, UsageError
from moesaic.model.transformer import Transformer
from moesaic.train.data import prepare_data
from moesaic.train.metrics import read_metrics
from moesaic.train.run import _advice, run_training
from moesaic.train.screen import Screen
from moesaic.train.trainer import Trainer

MODEL = ModelConfig(
    vocab_size=257,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    moe=MoEConfig(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, router="sigmoid_topk"),
)


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"{number} times {number} is {number * number}." for number in range(3000)))
    return TrainConfig(
        model=MODEL,
        data=DataConfig(source=str(text)),
        optimizer=OptimizerConfig(name="muon"),
        balance=BalanceConfig(bias_update_rate=0.01, aux_loss_coef=0.01, z_loss_coef=0.001),
        checkpoint=CheckpointConfig(save_every=4),
        steps=12,
        batch_size=8,
        sequence_length=32,
        evaluate_every=4,
        evaluation_tokens=256,
    )


def make_trainer(config: TrainConfig, directory: Path) -> Trainer:
    data = prepare_data(
        config.data,
        directory / "data",
        tokens_needed=config.steps * config.tokens_per_step + 1,
        sequence_length=config.sequence_length,
    )
    model = Transformer(config.model, backend=config.backend)
    model.init_weights(config.seed)
    return Trainer(config, model, data, directory)


def state(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def quiet() -> Screen:
    return Screen(live=False)


def rows(directory: Path, kind: str) -> list[dict[str, object]]:
    return [row for row in read_metrics(directory / "metrics.jsonl") if row["kind"] == kind]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_accumulated_micro_batches_make_the_same_update(
    config: TrainConfig, tmp_path: Path, micro_batch_size: int, checkpointing: bool
) -> None:
    whole = make_trainer(config, tmp_path)
    cut = make_trainer(
        replace(config, micro_batch_size=micro_batch_size, activation_checkpointing=checkpointing), tmp_path
    )
    for _ in range(2):
        expected, got = whole.train_step(), cut.train_step()
        assert got.loss == pytest.approx(expected.loss, rel=1e-5)
        assert got.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
        assert got.batch.z_loss == pytest.approx(expected.batch.z_loss, rel=1e-5)
        assert got.batch.aux_loss == pytest.approx(expected.batch.aux_loss, rel=1e-5)
        assert torch.equal(got.load, expected.load)
    for name, value in state(whole).items():
        torch.testing.assert_close(state(cut)[name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_the_bias_moves_once_per_step_and_not_in_evaluation(config: TrainConfig, tmp_path: Path) -> None:
    trainer = make_trainer(replace(config, micro_batch_size=2), tmp_path)
    trainer.train_step()
    biases = [layer.router.expert_bias for layer in trainer.model.moe_layers]
    assert all(bias is not None and 0 < float(bias.max() - bias.min()) <= 0.02 + 1e-6 for bias in biases)
    before = state(trainer)
    trainer.evaluate()
    assert all(torch.equal(value, before[name]) for name, value in state(trainer).items())


def test_noise_follows_from_the_seed_the_step_and_the_sequence(config: TrainConfig, tmp_path: Path) -> None:
    """And belongs to training: whoever left the model in evaluation mode changes nothing."""
    moe = MoEConfig(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, router="noisy_topk")
    config = replace(config, model=replace(MODEL, moe=moe), balance=BalanceConfig(aux_loss_coef=0.01))
    whole = make_trainer(config, tmp_path)
    cut = make_trainer(replace(config, micro_batch_size=2), tmp_path)
    cut.model.eval()
    expected, got = whole.train_step(), cut.train_step()
    assert got.loss == pytest.approx(expected.loss, rel=1e-5)
    assert torch.equal(got.load, expected.load)
    other = make_trainer(replace(config, seed=config.seed + 1), tmp_path)
    keys = [trainer._batch().noise_keys for trainer in (whole, other)]
    whole.step += 1
    keys = torch.cat([key for key in (*keys, whole._batch().noise_keys) if key is not None])
    assert len(keys.unique()) == 3 * config.batch_size


def test_advice_names_what_is_allowed_and_rarely_meant(config: TrainConfig) -> None:
    def advice(router: str, balance: BalanceConfig) -> str:
        moe = MoEConfig(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16, router=router)  # type: ignore[arg-type]
        return " ".join(_advice(replace(config, model=replace(MODEL, moe=moe), balance=balance)))

    assert "nothing balances the load, so experts may die; set balance.aux_loss_coef" in advice(
        "softmax_topk", BalanceConfig()
    )
    assert "nothing balances" not in advice("softmax_topk", BalanceConfig(aux_loss_coef=0.1))
    assert "nothing balances" not in advice("relu", BalanceConfig())
    assert "with the router expert_choice the experts of a token depend on later tokens" in advice(
        "expert_choice", BalanceConfig()
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_lowers_the_validation_loss(config: TrainConfig, tmp_path: Path, dtype: str) -> None:
    config = replace(config, steps=40, dtype=dtype)  # type: ignore[arg-type]
    run_training(config, tmp_path / "run", quiet())
    losses = [row["val_loss"] for row in rows(tmp_path / "run", "eval")]
    assert isinstance(losses[0], float)
    assert isinstance(losses[-1], float)
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_run_cut_in_two_equals_one_run_bitwise(config: TrainConfig, tmp_path: Path, optimizer: str) -> None:
    config = replace(config, optimizer=OptimizerConfig(name=optimizer), activation_checkpointing=True)  # type: ignore[arg-type]
    straight = run_training(config, tmp_path / "straight", quiet())

    class StopAt(Screen):
        def step(self, row: dict[str, object]) -> None:
            if row["step"] == 6:
                interrupted[0].stop_requested = True

    interrupted: list[Trainer] = []
    original = Trainer.run

    def remember(trainer: Trainer, *arguments: object) -> None:
        interrupted.append(trainer)
        original(trainer, *arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "run", remember)
        run_training(config, tmp_path / "cut", StopAt(live=False))
    assert newest_run_state(tmp_path / "cut").step == 6
    resumed = run_training(config, tmp_path / "cut", quiet(), resume=True)
    assert all(torch.equal(value, state(straight)[name]) for name, value in state(resumed).items())
    kept = ("step", "loss", "grad_norm", "load")
    for kind in ("train", "eval"):
        pairs = zip(rows(tmp_path / "straight", kind), rows(tmp_path / "cut", kind), strict=True)
        assert all([one.get(key) for key in kept] == [other.get(key) for key in kept] for one, other in pairs)


def test_a_loss_that_is_not_finite_changes_nothing_and_ends_the_run_after_some(
    config: TrainConfig, tmp_path: Path
) -> None:
    trainer = make_trainer(replace(config, max_nonfinite_steps=3), tmp_path)
    with torch.no_grad():
        trainer.model.norm.weight[0] = math.inf
    before = state(trainer)
    assert trainer.train_step().skipped
    assert all(torch.equal(value, before[name]) for name, value in state(trainer).items())
    with pytest.raises(
        MoesaicError, match=r"3 updates in a row were not finite, the last at step 4; .* lower --optimizer.lr"
    ):
        trainer.run(quiet())
    recorded = rows(tmp_path, "train")
    assert [row["skipped"] for row in recorded] == [True] * 3
    assert all(row["loss"] is None for row in recorded)


def test_one_finite_update_resets_the_count(config: TrainConfig, tmp_path: Path) -> None:
    trainer = make_trainer(replace(config, max_nonfinite_steps=2, steps=6), tmp_path)
    weight, poisoned = trainer.model.norm.weight, {2, 4, 6}
    original = trainer.train_step

    def poisoned_step() -> object:
        value = weight[0].item()
        if trainer.step + 1 in poisoned:
            weight.data[0] = math.nan
        update = original()
        if update.skipped:
            weight.data[0] = value
        return update

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "train_step", poisoned_step)
        trainer.run(quiet())
    assert [row["skipped"] for row in rows(tmp_path, "train")] == [False, True] * 3


def test_rows_are_json_and_carry_the_balance(config: TrainConfig, tmp_path: Path) -> None:
    run_training(replace(config, tensorboard=True), tmp_path, quiet())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    training = [row for row in lines if row["kind"] == "train"]
    assert [row["step"] for row in training] == list(range(1, 13))
    assert [row["step"] for row in lines if row["kind"] == "eval"] == [4, 8, 12]
    for row in training:
        assert [len(layer) for layer in row["load"]] == [8, 8]
        assert sum(row["load"][0]) == pytest.approx(1.0, abs=1e-3)
        assert row["max_vio"] >= 0
        assert 0 < row["mfu"] < 1
        assert row["aux_loss"] == pytest.approx(1.0, abs=0.5)
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_wrong_requests_are_refused(config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no saved state"):
        run_training(config, tmp_path / "run", quiet(), resume=True)
    run_training(config, tmp_path / "run", quiet())
    with pytest.raises(UsageError, match="already holds a run, saved at step 12; continue it with --resume"):
        run_training(config, tmp_path / "run", quiet())
    changed = replace(config, steps=13, optimizer=OptimizerConfig(lr=1.0))
    with pytest.raises(UsageError, match=r"another config \(optimizer, steps differ\)"):
        run_training(changed, tmp_path / "run", quiet(), resume=True)
    with pytest.raises(UsageError, match=r"the tokenizer has 257 entries but model.vocab_size is 200"):
        run_training(replace(config, model=replace(MODEL, vocab_size=200)), tmp_path / "small", quiet())


def test_a_finished_run_resumes_to_itself(config: TrainConfig, tmp_path: Path) -> None:
    finished = run_training(config, tmp_path, quiet())
    again = run_training(config, tmp_path, quiet(), resume=True)
    assert again.step == 12
    assert all(torch.equal(value, state(finished)[name]) for name, value in state(again).items())
