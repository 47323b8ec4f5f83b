"""Every known mistake, planted in a copy of the package, makes the test fail that is there for it.

Takes minutes, so it runs only when asked for: `pytest -m mutation`.
"""

import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# An editable installation would find the package before the copy does.
_PYTEST_ON_COPY = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
sys.path.insert(0, sys.argv[1])
import moesaic, pytest
assert moesaic.__file__.startswith(sys.argv[1])
sys.exit(pytest.main(["--quiet", "-x", "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


@dataclass(frozen=True)
class Mutation:
    """One text of one file that becomes another."""

    trap: str
    """What goes wrong."""
    path: str
    """Below src/moesaic."""
    old: str
    """Occurs once in the file."""
    new: str
    test: str
    """Below tests."""


BALANCE, TRAPS = "model/test_balance.py::", "train/test_traps.py::"
INVARIANCE = "train/test_invariance.py::test_no_way_to_compute_a_batch_changes_what_it_teaches"
_AFTER_CHOICE = "            weights_N = self.weigh(logits_TE, choice) * self.routed_scaling_factor\n"
_MOVE_BIAS = "self.expert_bias += torch.linspace(-0.1, 0.1, self.num_experts)\n"

MUTATIONS = (
    Mutation(
        "the Switch loss takes P from the chosen experts instead of the full softmax",
        "model/balance.py",
        "    return scores / (scores.sum(-1, keepdim=True) + 1e-20)",
        "    return scores * (scores >= scores.topk(2).values[:, -1:]) / (scores.sum(-1, keepdim=True) + 1e-20)",
        BALANCE + "test_switch_loss_is_the_published_sum_and_k_does_not_enter",
    ),
    Mutation(
        "the share f is not divided by K",
        "model/balance.py",
        "    return load.to(dtype) / load.sum(-1, keepdim=True).clamp_min(1)",
        "    return 2 * load.to(dtype) / load.sum(-1, keepdim=True).clamp_min(1)",
        BALANCE + "test_every_scope_is_1_at_balance",
    ),
    Mutation(
        "the share f is that of the rows that were computed, so what a capacity drops looks balanced",
        "model/balance.py",
        "_pooled(routing.load() if load is None else load, num_devices)",
        "_pooled(routing.tokens_per_expert() if load is None else load, num_devices)",
        BALANCE + "test_switch_loss_counts_what_was_asked_for_before_rows_are_dropped",
    ),
    Mutation(
        "the layers' tokens are counted together, so their imbalances cancel",
        "train/objective.py",
        "ranks.sum(torch.stack(loads).sum(0))",
        "ranks.sum(torch.stack(loads).sum((0, 1)).expand(num_layers, -1))",
        TRAPS + "test_imbalances_of_layers_do_not_cancel",
    ),
    Mutation(
        "the load of the global batch is that of the micro-batch",
        "train/objective.py",
        '    load_E = load if balance.aux_loss_scope == "global_batch" else None',
        "    load_E = None",
        TRAPS + "test_the_balance_loss_has_no_factor_of_the_micro_batches",
    ),
    Mutation(
        "micro-batches count alike, although padding leaves them unequally many targets",
        "train/objective.py",
        "_cross_entropy(logits_BLV, batch) / max(whole.num_targets, 1)",
        "_cross_entropy(logits_BLV, batch) / max(int(batch.counts()[0]) * len(micro_batches), 1)",
        TRAPS + "test_every_target_counts_alike_however_unequally_micro_batches_hold_them",
    ),
    Mutation(
        "the sequence loss is divided by the number of micro-batches once more",
        "model/balance.py",
        "(share_BG * mean_BG).sum() / max(count, 1)",
        "(share_BG * mean_BG).sum() / max(count, 1) * batch_size / max(count, 1)",
        TRAPS + "test_the_balance_loss_has_no_factor_of_the_micro_batches",
    ),
    Mutation(
        "sigmoid scores enter the Switch loss without being normalised",
        "model/balance.py",
        "    return scores / (scores.sum(-1, keepdim=True) + 1e-20)",
        "    return scores",
        BALANCE + "test_every_scope_is_1_at_balance",
    ),
    Mutation(
        "padding counts as load",
        "ops/routing.py",
        "            ids_N = ids_N[self.mask[self.choice.token_ids]]",
        "            pass",
        TRAPS + "test_padding_is_no_load_and_enters_no_expert",
    ),
    Mutation(
        "padding is sent to experts",
        "ops/routing.py",
        "        return replace(self, kept=is_token_N if self.kept is None else self.kept & is_token_N)",
        "        return self",
        TRAPS + "test_padding_is_no_load_and_enters_no_expert",
    ),
    Mutation(
        "padding has a part in the mean probability",
        "model/balance.py",
        "        probability_TG = probability_TG[routing.mask]\n    mean_G",
        "        pass\n    mean_G",
        BALANCE + "test_padding_counts_in_no_term",
    ),
    Mutation(
        "the bias moves with every forward pass, micro-batches alike",
        "model/routers/base.py",
        _AFTER_CHOICE,
        f"{_AFTER_CHOICE}            if self.training and self.expert_bias is not None:\n                {_MOVE_BIAS}",
        TRAPS + "test_the_bias_moves_once_per_step_by_the_load_of_the_whole_batch",
    ),
    Mutation(
        "the bias moves again when activation checkpointing recomputes",
        "model/routers/base.py",
        _AFTER_CHOICE,
        f"{_AFTER_CHOICE}            if context.replay and torch.is_grad_enabled() and self.expert_bias is not None:\n"
        f"                {_MOVE_BIAS}",
        INVARIANCE + "[sigmoid_topk, quantile bias]",
    ),
    Mutation(
        "the bias moves in evaluation",
        "model/routers/base.py",
        _AFTER_CHOICE,
        f"{_AFTER_CHOICE}            if not self.training and self.expert_bias is not None:\n"
        f"                {_MOVE_BIAS}",
        TRAPS + "test_evaluation_moves_no_bias",
    ),
    Mutation(
        "the bias moves by the load of the last micro-batch",
        "train/objective.py",
        "        statistics.add(routings, model)\n",
        "        statistics = RoutingStatistics(len(routers))\n        statistics.add(routings, model)\n",
        TRAPS + "test_the_bias_moves_once_per_step_by_the_load_of_the_whole_batch",
    ),
    Mutation(
        "the bias is bfloat16",
        "model/routers/base.py",
        "torch.zeros(self.num_experts, dtype=torch.float32) if moe.has_expert_bias",
        "torch.zeros(self.num_experts, dtype=torch.bfloat16) if moe.has_expert_bias",
        TRAPS + "test_the_bias_is_float32_and_loses_no_small_step",
    ),
    Mutation(
        "the bias weighs what it chose",
        "model/routers/topk.py",
        "        topk_weights_TK = self.scores_of(logits, topk_ids)",
        "        topk_weights_TK = (self.scores(logits) + self.expert_bias).gather(1, topk_ids)",
        TRAPS + "test_the_bias_chooses_and_never_weighs",
    ),
    Mutation(
        "router logits are computed in bfloat16",
        "model/routers/base.py",
        "            wide_TD = x if x.dtype == torch.float64 else x.float()",
        "            wide_TD = x",
        TRAPS + "test_router_logits_stay_float32_in_a_bfloat16_model",
    ),
    Mutation(
        "router logits are computed under autocast",
        "model/routers/base.py",
        "torch.autocast(x.device.type, enabled=False)",
        "torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=torch.is_autocast_enabled(x.device.type))",
        TRAPS + "test_router_logits_stay_float32_in_a_bfloat16_model",
    ),
    Mutation(
        "activation checkpointing routes anew",
        "model/transformer.py",
        "replace(seen, replay=made[0].decisions) if made else seen",
        "seen",
        TRAPS + "test_recomputation_takes_the_experts_of_the_forward_pass",
    ),
    Mutation(
        "softmax after top-1 is trained",
        "moe_config.py",
        "        return self.num_experts_per_tok == 1 and (divided_by_itself or over_chosen_only)",
        "        return self.num_experts_per_tok == 1 and divided_by_itself",
        TRAPS + "test_a_weight_that_is_always_1_is_refused",
    ),
    Mutation(
        "jitter changes what the experts see",
        "model/routers/base.py",
        "            x = x * (1.0 + self.input_jitter",
        "            x *= (1.0 + self.input_jitter",
        TRAPS + "test_jitter_touches_what_the_router_sees_and_nothing_else",
    ),
    Mutation(
        "an expert without tokens does not decay",
        "train/optimizer.py",
        '            keep=(1 - group["lr"] * group["weight_decay"]) ** every,',
        "            keep=1.0,",
        TRAPS + "test_an_expert_without_tokens_has_a_gradient_of_zero_and_still_decays",
    ),
    Mutation(
        "a batch without tokens leaves gradients out",
        "ops/reference.py",
        "        assignment_n = torch.nonzero(routing.expert_ids == expert).squeeze(1)\n",
        "        assignment_n = torch.nonzero(routing.expert_ids == expert).squeeze(1)\n"
        "        if not len(assignment_n):\n            continue\n",
        TRAPS + "test_a_batch_without_tokens_leaves_no_gradient_out",
    ),
    Mutation(
        "rows of weight 0 have a gradient to the router",
        "model/routers/topk.py",
        "routing.weights.new_zeros(len(added_N))",
        "(routing.weights - routing.weights.detach())[:1].expand(len(added_N))",
        TRAPS + "test_rows_that_fill_an_expert_up_leak_no_gradient_to_the_router",
    ),
    Mutation(
        "tokens compete with those of other sequences for an expert's room",
        "model/routers/capacity.py",
        "asked_TE.view(shape_BLE).cumsum(1)",
        "asked_TE.cumsum(0).view(shape_BLE)",
        INVARIANCE + "[capacity, drop]",
    ),
    Mutation(
        "padding makes room for tokens",
        "model/routing_context.py",
        "        if self.mask is not None:\n            return self.mask.sum(1)\n",
        "",
        INVARIANCE + "[capacity, drop]",
    ),
    Mutation(
        "noise depends on how the batch is cut",
        "model/transformer.py",
        "combine(noise_keys.unsqueeze(1), positions)",
        "combine(torch.arange(len(tokens)).unsqueeze(1), positions)",
        INVARIANCE + "[noisy_topk]",
    ),
    Mutation(
        "the stack distance counts the expert itself",
        "analysis/locality.py",
        "(before_ET > own_T)",
        "(before_ET >= own_T)",
        "analysis/test_locality.py::test_the_curve_equals_simulated_caches",
    ),
    Mutation(
        "the baseline shuffles single tokens, and what only lasts looks like meaning",
        "analysis/specialisation.py",
        "order_S[places] = generator.permutation(start_B)[:, None] + inside",
        "order_S = generator.permutation(len(self.kept))",
        "analysis/test_specialisation.py::test_what_only_lasts_is_not_called_meaning",
    ),
    Mutation(
        "a damaged trace is read",
        "analysis/trace.py",
        "if sha256_of(path) != digest:",
        "if False:",
        "analysis/test_trace.py::test_damage_is_one_clear_error",
    ),
    Mutation(
        "REAP sums where it should take the mean, so that load decides",
        "analysis/expert_scores.py",
        "        return self.contribution / self.tokens.clamp_min(1)",
        "        return self.contribution",
        "analysis/test_expert_scores.py::test_scores_are_those_of_a_plain_loop",
    ),
    Mutation(
        "merged experts keep the order of their own hidden units",
        "checkpoint/merge.py",
        "        order_F = match(likeness_FF)",
        "        order_F = torch.arange(len(likeness_FF))",
        "checkpoint/test_merge.py::test_merging_two_identical_experts_changes_nothing",
    ),
    Mutation(
        "the last feed-forward computes other tokens than those that are kept",
        "model/block.py",
        "            x, seen = x[:, kept], seen.of_tokens(kept)",
        "            x, seen = x[:, -len(kept) :], seen.of_tokens(kept)",
        "model/test_skip_others.py::test_what_is_kept_is_as_if_all_were",
    ),
    Mutation(
        "the norm averages experts over their ranks",
        "parallel/gradients.py",
        "            squares += square / ranks.replicas(of_expert=of_expert[name])",
        "            squares += square / ranks.count",
        "parallel/test_gradients.py::test_the_norm_counts_every_expert_once",
    ),
    Mutation(
        "FSDP2 divides gradients that are sums",
        "parallel/shard.py",
        "            module.set_gradient_divide_factor(1.0)",
        "            module.set_gradient_divide_factor(2.0)",
        "parallel/test_gradients.py::test_a_step_of_gradient_descent_is_that_of_one_process",
    ),
    Mutation(
        "expert gradients are summed over the ep group again",
        "parallel/gradients.py",
        "    ranks.sum_replicas(flat, of_expert=of_expert)",
        "    ranks.sum_replicas(flat, of_expert=False)",
        "parallel/test_gradients.py::test_a_step_of_gradient_descent_is_that_of_one_process",
    ),
)


def run_on_copy(source: Path, test: str, seed: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-B", "-c", _PYTEST_ON_COPY, str(source), f"--seed={seed}", str(ROOT / "tests" / test)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def copied_source(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "src"


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.trap)
def test_every_mutation_names_one_text_and_one_test(mutation: Mutation) -> None:
    assert (ROOT / "src" / "moesaic" / mutation.path).read_text().count(mutation.old) == 1
    path, _, name = mutation.test.partition("::")
    assert f"def {name.partition('[')[0]}(" in (ROOT / "tests" / path).read_text()


@pytest.mark.mutation
@pytest.mark.parametrize("test", sorted({mutation.test for mutation in MUTATIONS}))
def test_without_a_mutation_the_test_passes(test: str, copied_source: Path, seed: int) -> None:
    result = run_on_copy(copied_source, test, seed)
    assert result.returncode == 0, result.stdout


@pytest.mark.mutation
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.trap)
def test_a_planted_mistake_is_found(mutation: Mutation, copied_source: Path, seed: int) -> None:
    path = copied_source / "moesaic" / mutation.path
    path.write_text(path.read_text().replace(mutation.old, mutation.new))
    result = run_on_copy(copied_source, mutation.test, seed)
    assert result.returncode == 1, result.stdout  # a test that failed; others are errors of pytest itself
    assert " failed" in result.stdout, result.stdout
