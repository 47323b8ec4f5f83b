"""`moesaic doctor`: what this machine has, which backend is picked, and why not another."""

import json
import os
import platform

from rich.console import Console
from rich.table import Table

from moesaic.cli.options import JsonFlag


def doctor(*, json_output: JsonFlag = False) -> None:
    """Say what this machine has, which expert backend it gets, and why.

    Parameters
    ----------
    json_output
        One JSON object with backend, instruction_set and the rest.
    """
    import torch

    from moesaic.ops import BACKENDS, ExpertShape, pick, refusal
    from moesaic.ops.device import device_name, measured_matmul_peak, resolve_device
    from moesaic.ops.instruction_set import (
        cpu_features,
        expert_kernels_status,
        instruction_set,
        native_status,
        packed_kernels_status,
    )

    device = resolve_device("auto")
    shape = ExpertShape(hidden_size=1024, moe_intermediate_size=512, device=device.type, dtype=torch.float32)
    picked = pick("auto", shape)
    peaks = {
        name: round(measured_matmul_peak(device.type, dtype) / 1e9)
        for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
    }
    report = {
        "backend": picked,
        "instruction_set": instruction_set(),
        "native_kernels": native_status(),
        "expert_kernels": expert_kernels_status(),
        "packed_kernels": packed_kernels_status(),
        "device": device_name(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "gflops": peaks,
        "cpu_features": [name for name, present in cpu_features().items() if present],
        "backends": {
            name: refusal(name, shape) or ("picked" if name == picked else f"works; {picked} is faster")
            for name in BACKENDS
        },
    }
    if json_output:
        print(json.dumps(report))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    shown = ("device", "instruction_set", "native_kernels", "expert_kernels", "packed_kernels")
    for key in (*shown, "cores", "threads", "torch", "python"):
        table.add_row(key.replace("_", " "), str(report[key]))
    table.add_row("matrix products", f"{peaks['float32']} GFLOP/s in float32, {peaks['bfloat16']} in bfloat16")
    for name, reason in report["backends"].items():
        table.add_row(f"backend {name}", f"{BACKENDS[name].about} ({reason})")
    Console().print(table)
