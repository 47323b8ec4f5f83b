"""`moesaic launch`: a job file that trains a config on many machines."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from moesaic.cli.train import start_values
from moesaic.config_io import read_train_config
from moesaic.errors import UsageError

PORT = 29500
Flag = Annotated[bool, Parameter(negative="")]


def launch(
    config: Path,
    /,
    *overrides: Annotated[str, Parameter(allow_leading_hyphen=True, show=False)],
    slurm: Flag = False,
    kubeflow: Flag = False,
    skypilot: Flag = False,
    nodes: int = 1,
    gpus_per_node: int = 8,
    gpu: str = "H100",
    image: str = "pytorch/pytorch:latest",
    out: Path | None = None,
) -> int:
    """Print a job file that trains CONFIG under torchrun on many machines; any key of it is a flag, as for train.

    The machines need moesaic and a folder that all of them see, for CONFIG and --out. A job that was interrupted goes
    on from its newest state when it is started again.

    Parameters
    ----------
    config
        TOML file, by a path that the machines have too.
    slurm
        For sbatch.
    kubeflow
        A PyTorchJob, for kubectl apply.
    skypilot
        For sky launch.
    gpu
        Kind of accelerator, for SkyPilot.
    image
        Container that has moesaic, for Kubeflow.
    out
        Run directory; runs/NAME-OF-CONFIG unless given.
    """
    chosen = [name for name, flag in (("slurm", slurm), ("kubeflow", kubeflow), ("skypilot", skypilot)) if flag]
    if len(chosen) != 1:
        raise UsageError(f"{len(chosen)} kinds of job file were asked for; add one of --slurm, --kubeflow, --skypilot")
    train = read_train_config(config, overrides, start_values)
    if nodes < 1 or gpus_per_node < 1:
        raise UsageError(f"nodes is {nodes} and gpus_per_node {gpus_per_node}; both must be at least 1")
    ranks, layout = nodes * gpus_per_node, train.parallel
    inner = layout.fsdp * layout.ep
    if ranks % inner or (layout.dp and layout.dp * inner != ranks):
        raise UsageError(
            f"{nodes} x {gpus_per_node} = {ranks} ranks cannot be dp {layout.dp or 'any'} x fsdp {layout.fsdp} x "
            f"ep {layout.ep}; set --parallel.dp 0 and let fsdp x ep divide {ranks}"
        )
    if train.batch_size % ranks:
        raise UsageError(
            f"batch_size is {train.batch_size}, which {ranks} ranks cannot share evenly; add --batch-size "
            f"{-(-train.batch_size // ranks) * ranks}"
        )
    arguments = ["train", str(config), *overrides, "--out", str(out or Path("runs") / config.stem), "--plain"]
    print(JOBS[chosen[0]](config.stem, nodes, gpus_per_node, gpu, image, arguments), end="")
    return 0


def _training(torchrun: str, arguments: list[str]) -> str:
    """A shell line that starts a run, or goes on with one that has a saved state, at each restart."""
    return f"{torchrun} -m moesaic {shlex.join(arguments)} --resume-if-there"


def _torchrun(nodes: str, gpus: int, address: str) -> str:
    return (
        f"torchrun --nnodes {nodes} --nproc-per-node {gpus} --max-restarts 3 --rdzv-backend c10d "
        f"--rdzv-endpoint {address}:{PORT}"
    )


def _slurm(name: str, nodes: int, gpus: int, gpu: str, image: str, arguments: list[str]) -> str:
    torchrun = _torchrun("$SLURM_NNODES", gpus, "$MASTER") + " --rdzv-id $SLURM_JOB_ID"
    # One shell on each node, which sees MASTER through the environment that srun hands on.
    command = shlex.quote(_training(torchrun, arguments))
    return f"""#!/bin/bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node={gpus}
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --output=%x-%j.log

export MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 bash -c {command}
"""


def _kubeflow(name: str, nodes: int, gpus: int, gpu: str, image: str, arguments: list[str]) -> str:
    # The operator gives every pod MASTER_ADDR. JSON is YAML, and quotes whatever is in a command.
    command = json.dumps(["bash", "-c", _training(_torchrun(str(nodes), gpus, "$MASTER_ADDR"), arguments)])
    roles = [("Master", 1)] + ([("Worker", nodes - 1)] if nodes > 1 else [])
    replicas = "".join(
        f"""    {role}:
      replicas: {count}
      restartPolicy: OnFailure
      template:
        spec:
          containers:
            - name: pytorch
              image: {json.dumps(image)}
              workingDir: /workspace
              command: {command}
              resources:
                limits:
                  nvidia.com/gpu: {gpus}
              volumeMounts:
                - {{name: workspace, mountPath: /workspace}}
                - {{name: shm, mountPath: /dev/shm}}
          volumes:
            - name: workspace
              persistentVolumeClaim: {{claimName: moesaic}}
            - name: shm
              emptyDir: {{medium: Memory}}
"""
        for role, count in roles
    )
    label = "".join(letter if letter.isalnum() else "-" for letter in name.lower()).strip("-")
    return f"""apiVersion: kubeflow.org/v1
kind: PyTorchJob
metadata:
  name: {json.dumps(label)}
spec:
  pytorchReplicaSpecs:
{replicas}"""


def _skypilot(name: str, nodes: int, gpus: int, gpu: str, image: str, arguments: list[str]) -> str:
    torchrun = _torchrun("$SKYPILOT_NUM_NODES", gpus, "$MASTER")
    return f"""name: {json.dumps(name)}
num_nodes: {nodes}
workdir: .
resources:
  accelerators: {gpu}:{gpus}
setup: |
  pip install moesaic
run: |
  MASTER=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)
  {_training(torchrun, arguments)}
"""


JOBS: dict[str, Callable[[str, int, int, str, str, list[str]], str]] = {
    "slurm": _slurm,
    "kubeflow": _kubeflow,
    "skypilot": _skypilot,
}
