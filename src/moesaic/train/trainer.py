"""The training loop: batch -> micro-batches -> loss -> update -> balance -> record, until the last step.

B sequences of a batch, L positions, M mixture-of-experts layers, E experts.
"""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.accounting import training_flops_per_token
from moesaic.checkpoint.adapters import BASE
from moesaic.checkpoint.run_state import RunState
from moesaic.config import TrainConfig
from moesaic.config_io import to_mapping
from moesaic.errors import MoesaicError
from moesaic.model.lora import adapted_state, load_adapted_state
from moesaic.model.noise import combine
from moesaic.model.transformer import Transformer
from moesaic.ops import DTYPES
from moesaic.ops.device import measured_matmul_peak
from moesaic.parallel.gradients import clip_gradients, gradient_norm, sum_gradients
from moesaic.parallel.ranks import Ranks
from moesaic.parallel.shard import Part, own_parts, read_parts
from moesaic.train.data import PreparedData, TrainBatches, validation_batches
from moesaic.train.evaluate import Evaluation, evaluate
from moesaic.train.metrics import MetricsLog
from moesaic.train.objective import Batch, BatchResult, accumulate_gradients, update_after_step
from moesaic.train.optimizer import load_optimizer_tensors, make_optimizers, optimizer_tensors, prepare_step
from moesaic.train.saving import StateWriter
from moesaic.train.schedule import rate_factor
from moesaic.train.screen import Screen


@dataclass(frozen=True)
class Update:
    """What one optimizer step did."""

    batch: BatchResult
    grad_norm: float
    skipped: bool
    """The loss or the gradient was not finite, so nothing was changed."""

    @property
    def loss(self) -> float:
        return self.batch.loss

    @property
    def load(self) -> Tensor:
        """(M, E) int64: rows that the tokens of the whole batch asked of each expert."""
        return self.batch.statistics.load


class Trainer:
    """One run: the model, its optimizers and where it stands. Everything that decides the next step is in the state."""

    def __init__(
        self,
        config: TrainConfig,
        model: Transformer,
        data: PreparedData,
        run_directory: Path,
        ranks: Ranks | None = None,
        *,
        base: Mapping[str, str] | None = None,
    ) -> None:
        """Of several `ranks` each has its part of the model and a share of every batch; the first one writes.

        `base` says what the model started from, for the states.
        """
        self.config = config
        self.ranks = ranks or Ranks()
        self.model = model
        self.data = data
        self.run_directory = run_directory
        self.base = base
        self.states = StateWriter(run_directory, self.ranks, config.checkpoint)
        self.device = model.embed_tokens.weight.device
        self.optimizers = make_optimizers(model, config.optimizer)
        self.batches = TrainBatches(data.train, config.sequence_length, config.batch_size, config.seed)
        self.token_bytes = torch.tensor(data.tokenizer.token_bytes())
        self.step = 0
        self.training_seconds = 0.0
        self.nonfinite_steps = 0
        self.stop_requested = False
        model.activation_checkpointing = config.activation_checkpointing

    def run(self, screen: Screen, resume_from: RunState | None = None) -> None:
        """Train to the last step, or until `stop_requested`; either way the state is saved at the end.

        Raises:
            MoesaicError: the loss was not finite for `max_nonfinite_steps` steps in a row.
        """
        if resume_from is not None:
            self._restore(resume_from, screen)
        log = self._open_log()
        peak_flops = measured_matmul_peak(self.device.type, DTYPES[self.config.dtype])
        flops = training_flops_per_token(self.config.model, self.config.sequence_length)
        saved_step = self.step if resume_from is not None else None
        try:
            if saved_step is None:
                saved_step = self._save(screen)  # so that a run can be resumed from its first moment on
            while self.step < self.config.steps and not self.stop_requested:
                self.ranks.tell(f"step {self.step + 1}")
                start = time.perf_counter()
                update = self.train_step()
                seconds = time.perf_counter() - start
                self.training_seconds += seconds
                row = self._training_row(update, seconds, flops, peak_flops)
                if log:
                    log.write(row)
                screen.step(row)
                self._count_skipped(update, screen)
                if self._due(self.config.evaluate_every):
                    row = self._evaluation_row(self.evaluate(), flops)
                    if log:
                        log.write(row)
                    screen.evaluation(row)
                if self._due(self.config.checkpoint.save_every) and self.nonfinite_steps == 0:
                    saved_step = self._save(screen)
                self.stop_requested = self.ranks.any(self.stop_requested)  # or some would wait for those that stopped
                if self.config.checkpoint.background and self.ranks.any(self.states.failed):
                    self.states.finish(_reporter(screen))
            if saved_step != self.step:
                self._save(screen)
            self.states.finish(_reporter(screen))
        finally:
            if log:
                log.close()

    def train_step(self) -> Update:
        """One optimizer step on batch number `self.step`; advances the step even when the update is skipped."""
        factor = rate_factor(self.step, self.config.steps, self.config.schedule)
        prepare_step(self.optimizers, self.step, factor)
        batch = self._batch().to(self.device)
        micro_batches = batch.split(self.config.micro_batch_size or len(batch.tokens))
        self.model.train()  # noise and capacities belong to training
        balance = self.config.balance
        dtype = DTYPES[self.config.dtype]
        result = accumulate_gradients(self.model, micro_batches, balance, dtype=dtype, ranks=self.ranks)
        sum_gradients(self.model, self.ranks)
        grad_norm = self._clip_gradients()
        skipped = not (math.isfinite(result.loss) and math.isfinite(grad_norm))
        if not skipped:
            for optimizer in self.optimizers:
                optimizer.step()
            update_after_step(self.model, result, balance, factor)
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return Update(result, grad_norm, skipped)

    def evaluate(self, num_domains: int = 1) -> Evaluation:
        """Score `evaluation_tokens` of the validation text, spread evenly over it."""
        config = self.config
        batches = validation_batches(
            self.data.validation,
            config.sequence_length,
            config.micro_batch_size or config.batch_size,
            config.evaluation_tokens,
        )
        dtype = DTYPES[config.dtype]
        return evaluate(
            self.model, batches, self.token_bytes, num_domains=num_domains, dtype=dtype, ranks=self.ranks
        )  # fmt: skip

    def _clip_gradients(self) -> float:
        """Returns their norm before it."""
        norm = gradient_norm(self.model, self.ranks)
        if self.config.optimizer.gradient_clip:
            clip_gradients(self.model, self.config.optimizer.gradient_clip, norm)
        return float(norm)

    def _batch(self) -> Batch:
        """This rank's sequences of batch number `self.step`; their noise follows from the seed, the step and their
        number alone."""
        tokens_BL, targets_BL = self.batches.batch(self.step)
        step_key = combine(torch.tensor(self.config.seed), self.step)
        keys_B = combine(step_key, torch.arange(len(tokens_BL)))
        mine = self.ranks.share(len(tokens_BL))
        return Batch(tokens_BL[mine], targets_BL[mine], noise_keys=keys_B[mine])

    def _open_log(self) -> MetricsLog | None:
        if not self.ranks.is_first:
            return None
        return MetricsLog(self.run_directory, resume_step=self.step, tensorboard=self.config.tensorboard)

    def _count_skipped(self, update: Update, screen: Screen) -> None:
        if not update.skipped:
            self.nonfinite_steps = 0
            return
        self.nonfinite_steps += 1
        screen.note(f"step {self.step}: the loss or its gradient is not finite; this update was skipped")
        if self.nonfinite_steps >= self.config.max_nonfinite_steps:
            raise MoesaicError(
                f"{self.nonfinite_steps} updates in a row were not finite, the last at step {self.step}; start "
                "anew with a lower --optimizer.lr (and matrix_lr, feed_forward_lr), lower [balance] coefficients and "
                "another --out"
            )

    def _due(self, every: int) -> bool:
        return self.step == self.config.steps or (every > 0 and self.step % every == 0)

    def _progress(self) -> dict[str, Any]:
        tokens = self.step * self.config.tokens_per_step
        return {"step": self.step, "tokens": tokens, "seconds": round(self.training_seconds, 4)}

    def _training_row(self, update: Update, seconds: float, flops: float, peak_flops: float) -> dict[str, Any]:
        tokens_per_second = self.config.tokens_per_step / seconds
        return {
            "kind": "train",
            **self._progress(),
            "loss": _finite(update.loss),
            "aux_loss": _finite(update.batch.aux_loss),
            "z_loss": _finite(update.batch.z_loss),
            "l1_loss": _finite(update.batch.l1_loss),
            "depth_loss": _finite(update.batch.depth_loss),
            "lr": self.optimizers[0].param_groups[0]["lr"],
            "grad_norm": _finite(update.grad_norm),
            "tokens_per_second": round(tokens_per_second, 1),
            "mfu": round(tokens_per_second * flops / (peak_flops * self.ranks.count), 4),
            **update.batch.statistics.row(),
            "skipped": update.skipped,
        }

    def _evaluation_row(self, evaluation: Evaluation, flops: float) -> dict[str, Any]:
        progress = self._progress()
        return {
            "kind": "eval",
            **progress,
            "flops": progress["tokens"] * flops,
            "val_loss": _finite(evaluation.loss),
            "bits_per_byte": _finite(evaluation.bits_per_byte),
            **evaluation.routing.row(),
        }

    def _save(self, screen: Screen) -> int:
        """Write the state of this step, each rank its part; older ones stay whole if the disk is full."""
        weights = adapted_state(self.model)  # first: it puts parameters that FSDP2 has gathered back into their parts
        moments = optimizer_tensors(self.optimizers, self.model)
        tensors = {
            **{f"model.{name}": part for name, part in own_parts(self.model, weights, self.ranks).items()},
            **{f"optimizer.{name}": part for name, part in own_parts(self.model, moments, self.ranks).items()},
        }
        if self.ranks.is_first:
            tensors |= {f"random.{name}": Part(value, 0, len(value)) for name, value in self._random_states().items()}
        extra = {
            "config": to_mapping(self.config),
            "tokenizer": self.data.tokenizer.fingerprint,
            "training_seconds": self.training_seconds,
            "threads": torch.get_num_threads(),
            **({BASE: dict(self.base)} if self.base else {}),
        }
        self.states.save(self.step, tensors, extra, _reporter(screen))
        return self.step

    def _restore(self, state: RunState, screen: Screen) -> None:
        with state.open_tensors("model") as stored:
            load_adapted_state(self.model, read_parts(self.model, stored.shapes, stored.read_rows, self.ranks))
        with state.open_tensors("optimizer") as stored:
            moments = read_parts(self.model, stored.shapes, stored.read_rows, self.ranks)
        load_optimizer_tensors(self.optimizers, self.model, moments)
        random = state.load_tensors("random")
        torch.set_rng_state(random["cpu"])
        if self.device.type == "cuda" and "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"], self.device)
        self.step = state.step
        self.training_seconds = state.value("training_seconds")
        threads = state.value("threads")
        if threads != torch.get_num_threads():
            screen.note(
                f"this run was saved with {threads} threads and goes on with {torch.get_num_threads()}: "
                "the last bits of its numbers may differ from an undisturbed run"
            )

    def _random_states(self) -> dict[str, Tensor]:
        states = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            states["cuda"] = torch.cuda.get_rng_state(self.device)
        return states


def _reporter(screen: Screen) -> Callable[[int], None]:
    return lambda step: screen.note(f"step {step}: state saved")


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
