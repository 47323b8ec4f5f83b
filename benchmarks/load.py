"""Time and peak memory from a directory of weights to a model that can run, against transformers.

Each load is a fresh process, sides take turns, and the clock stops when every weight has been read once: a library that
maps files pays for them no later than at the first token. Peak is the high-water mark of resident memory above what the
process held before the load. The checkpoint is random, bfloat16, in shards: OLMoE's layer shape as Qwen3-MoE.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from common import ROOT, Row, note, positive, run_benchmark

from moesaic.accounting import weight_bytes
from moesaic.config import ModelConfig, MoEConfig

CONFIG = ModelConfig(
    vocab_size=50304,
    hidden_size=2048,
    num_hidden_layers=4,
    num_attention_heads=16,
    num_key_value_heads=16,
    head_dim=128,
    max_position_embeddings=4096,
    moe=MoEConfig(num_experts=64, num_experts_per_tok=8, moe_intermediate_size=1024),
)

CHILD = """
import json, sys, time, warnings
import torch
side, directory = sys.argv[1:]
warnings.simplefilter("ignore")

def status(key):
    line = next(line for line in open("/proc/self/status") if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024

if side == "ours":
    import moesaic.checkpoint.load
    import moesaic
    load = lambda: moesaic.load(directory, device="cpu")
else:
    import transformers
    from transformers.models.qwen3_moe import modeling_qwen3_moe
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    load = lambda: transformers.AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts again from here
start = time.perf_counter()
model = load()
loaded = time.perf_counter()
parameters = sum(p.numel() for p in model.parameters())
checksum = sum(int(p.detach().view(torch.int64).sum()) for p in model.parameters()) % 2**63  # copies nothing
touched = time.perf_counter()
print(json.dumps({
    "seconds": touched - start, "load_seconds": loaded - start, "peak": status("VmHWM") - before,
    "parameters": parameters, "checksum": checksum,
}))
"""


def measure(arguments: argparse.Namespace) -> list[Row]:
    assert CONFIG.moe is not None
    config = replace(CONFIG, num_hidden_layers=1) if arguments.quick else CONFIG
    weights = weight_bytes(config, "bfloat16")
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "checkpoint"
        note(f"writing a random checkpoint of {weights / 1e9:.2f} GB")
        write_checkpoint(config, directory)
        found: dict[str, list[dict[str, float]]] = {"ours": [], "transformers": []}
        for _ in range(arguments.repeats + 1):
            for side, results in found.items():
                results.append(run(side, directory))
                note(f"{side}: {results[-1]['seconds']:.2f} s, peak {results[-1]['peak'] / weights:.3f} x the weights")
    checksums = {result["checksum"] for results in found.values() for result in results}
    assert len(checksums) == 1, "both sides must hold the same weights"
    timed = {side: results[1:] for side, results in found.items()}  # the first round warms the page cache
    seconds = {side: statistics.median(result["seconds"] for result in results) for side, results in timed.items()}
    peak = {side: statistics.median(result["peak"] for result in results) / weights for side, results in timed.items()}
    speed = seconds["transformers"] / seconds["ours"]
    size = f"{weights / 1e9:.2f} GB"
    return [
        Row(
            work=f"load {size}, warm page cache, every weight read once", unit="s", ours=seconds["ours"],
            peer=seconds["transformers"], peer_name="transformers", ratio=speed, goal=1.0, met=speed >= 1.0,
        ),
        Row(
            work=f"peak resident memory of loading {size} (less is better)", unit="x weights", ours=peak["ours"],
            peer=peak["transformers"], peer_name="transformers", goal=1.1, met=peak["ours"] <= 1.1,
        ),
    ]  # fmt: skip


def write_checkpoint(config: ModelConfig, directory: Path) -> None:
    from moesaic.checkpoint.save import export_model
    from moesaic.model.transformer import Transformer

    with torch.device("meta"):
        model = Transformer(config)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.normal_(0.0, 0.02, generator=generator)
    export_model(model, None, directory, max_shard_bytes=10**9)


def run(side: str, directory: Path) -> dict[str, float]:
    command = [sys.executable, "-c", CHILD, side, str(directory)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{side} failed: {result.stderr[-2000:]}")
    return dict(json.loads(result.stdout.splitlines()[-1]))


if __name__ == "__main__":
    run_benchmark(__doc__ or "", measure, ("--repeats", {"type": positive, "default": 5, "help": "timed rounds"}))
