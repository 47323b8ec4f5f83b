"""Kill a training process with SIGKILL at random moments; the resumed run must equal an undisturbed one bitwise.

Every process is a real `moesaic train`; the kills fall anywhere: start-up, data, steps, saving.
"""

import argparse
import hashlib
import json
import math
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, Row, note, positive, run_benchmark

STEPS = 800
MOST_TRAINING = 0.25
"""How long a process may train before it is killed, as a share of the time that its start takes on this machine."""
CONFIG = """
steps = {steps}
batch_size = 4
micro_batch_size = 2
sequence_length = 32
evaluate_every = 50
evaluation_tokens = 256

[data]
source = "{text}"
tokenizer = "bytes"

[model]
hidden_size = 32
num_hidden_layers = 2
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 16
[model.moe]
num_experts = 8
num_experts_per_tok = 2
moe_intermediate_size = 16
router = "sigmoid_topk"

[optimizer]
name = "muon"

[balance]
bias_update_rate = 0.01

[checkpoint]
save_every = 3
"""


def measure(arguments: argparse.Namespace) -> list[Row]:
    kills = arguments.kills or (20 if arguments.quick else 100)
    seed = arguments.seed if arguments.seed is not None else random.SystemRandom().randrange(2**31)
    note(f"{kills} kills, random moments from seed {seed}")
    with tempfile.TemporaryDirectory() as scratch:
        return [_measure(Path(scratch), kills, random.Random(seed))]


def _measure(scratch: Path, kills: int, moments: random.Random) -> Row:
    text, config = scratch / "text.txt", scratch / "config.toml"
    text.write_text("\n\n".join(path.read_text() for path in sorted((ROOT / "src").rglob("*.py"))))
    config.write_text(CONFIG.format(steps=STEPS * max(1, kills // 20), text=text))
    undisturbed, disturbed = scratch / "undisturbed", scratch / "disturbed"

    _run_to_end(config, undisturbed)
    startup = _startup_seconds(config, scratch / "startup")
    resumed_from: list[int] = []
    in_training = 0
    while len(resumed_from) < kills:
        # Every other kill falls anywhere from the first moment of the process, the rest while it trains and saves.
        among_steps = len(resumed_from) % 2 == 1
        killed = _kill(config, disturbed, moments, startup, among_steps=among_steps)
        if not killed:
            raise SystemExit(f"the run ended after {len(resumed_from)} kills; raise STEPS")
        in_training += among_steps
        resumed_from.append(_newest_step(disturbed) or 0)
    note(f"newest saved step after each kill: {resumed_from}")
    _run_to_end(config, disturbed)
    equal = _fingerprint(disturbed) == _fingerprint(undisturbed)
    return Row(
        work=f"{kills} SIGKILLs, {in_training} of them among steps and saves, which left "
        f"{len(set(resumed_from))} different states behind; final states and records equal bitwise",
        unit="1 = equal",
        ours=float(equal),
        goal=1.0,
        met=equal,
    )


def _kill(config: Path, run: Path, moments: random.Random, startup: float, *, among_steps: bool) -> bool:
    """Start (or resume) the run and kill it; False when it ended by itself before that."""
    metrics = run / "metrics.jsonl"
    before, training = _written(metrics), MOST_TRAINING * startup
    moment = moments.uniform(0, training if among_steps else startup)
    with subprocess.Popen(_command(config, run), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        started, training_since = time.monotonic(), math.inf
        while process.poll() is None:
            now = time.monotonic()
            if _written(metrics) != before:
                training_since = min(training_since, now)
            waited = now - (training_since if among_steps else started)
            if waited >= moment or now - training_since >= training:
                process.kill()
                break
            time.sleep(0.005)
        _, errors = process.communicate()
    if process.returncode > 0:
        raise SystemExit(f"the process failed by itself: {errors.decode()}")
    return process.returncode == -signal.SIGKILL


def _written(path: Path) -> int:
    """When the file was last written to; 0 before it exists."""
    return path.stat().st_mtime_ns if path.exists() else 0


def _command(config: Path, run: Path) -> list[str]:
    resume = ["--resume"] if _newest_step(run) is not None else []
    return [sys.executable, "-m", "moesaic", "train", str(config), "--out", str(run), "--plain", *resume]


def _run_to_end(config: Path, run: Path) -> None:
    subprocess.run(_command(config, run), check=True, stdout=subprocess.DEVNULL)


def _startup_seconds(config: Path, run: Path) -> float:
    """From the start of a process to its first saved state."""
    start = time.monotonic()
    process = subprocess.Popen(_command(config, run), stdout=subprocess.DEVNULL)
    while _newest_step(run) is None and process.poll() is None:
        time.sleep(0.02)
    process.kill()
    process.wait()
    shutil.rmtree(run)
    return time.monotonic() - start


def _newest_step(run: Path) -> int | None:
    steps = [
        int(path.name.removeprefix("step-")) for path in (run / "states").glob("step-*") if path.name[5:].isdigit()
    ]
    return max(steps, default=None)


def _fingerprint(run: Path) -> tuple[dict[str, str], list[tuple[object, ...]]]:
    """Hashes of the last state's tensors, and every recorded loss and load."""
    newest = run / "states" / f"step-{_newest_step(run):08d}"
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in newest.glob("*.safetensors")}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = ("kind", "step", "loss", "val_loss", "grad_norm", "load")
    return hashes, [tuple(str(row.get(key)) for key in kept) for row in rows]


if __name__ == "__main__":
    run_benchmark(
        __doc__ or "",
        measure,
        ("--kills", {"type": positive, "help": "how many processes are killed (default 100, quick 20)"}),
        ("--seed", {"type": int, "help": "seed of the moments; default: fresh"}),
    )
