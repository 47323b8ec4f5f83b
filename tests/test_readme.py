"""The README as pasted: its commands and its Python run. `make` lines are dry-run, and the demo is a short one."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def run(command: list[str], folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, input="hello\n")
    assert result.returncode == 0, f"{shlex.join(command)}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def test_commands_work_when_pasted(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "README.md").symlink_to(ROOT / "README.md")
    (tmp_path / "src").symlink_to(ROOT / "src")
    moesaic = [sys.executable, "-m", "moesaic"]
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.strip()]
    commands = [shlex.split(line, comments=True) for line in lines]
    assert ["make", "demo"] in commands
    for command in commands:
        if command == ["make", "demo"]:
            out = run([*moesaic, "demo", "--minutes", "0.1", "--plain"], tmp_path)
            assert "moesaic chat runs/demo/sparse" in out
            check_demo(tmp_path / "runs" / "demo")
        elif command[0] == "make":
            run(["make", "--dry-run", "-C", str(ROOT), *command[1:]], tmp_path)
        elif command[1] == "serve":
            check_server([*moesaic, *command[1:], "--port", "0"], tmp_path)
        else:
            assert command[0] == ".venv/bin/moesaic"
            run([*moesaic, *command[1:]], tmp_path)
    check_python(tmp_path)


def check_demo(folder: Path) -> None:
    """What scripts and people find after a demo."""
    summary = json.loads((folder / "summary.json").read_text())
    keys = {
        "val_loss", "bits_per_byte", "tokens_per_second", "seconds", "parameters_total", "parameters_active",
    }  # fmt: skip
    assert keys <= summary["sparse"].keys()
    assert keys <= summary["dense"].keys()
    assert {"seconds_to_dense_loss", "max_vio"} <= summary["sparse"].keys()
    assert abs(summary["sparse"]["parameters_active"] / summary["dense"]["parameters_active"] - 1) < 0.02
    assert summary["sparse"]["parameters_total"] > 2 * summary["dense"]["parameters_total"]
    assert summary["sample"]
    page = (folder / "report.html").read_text()
    assert "https://" not in page
    for name in ("loss_tokens", "loss_flops", "loss_seconds", "expert_load", "domain_experts"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def check_server(command: list[str], folder: Path) -> None:
    """It answers what the README asks it, and ends when it is told to."""
    (block,) = blocks("console")
    curl = shlex.split(block.removeprefix("$ ").replace("\\\n", " "))
    address, body = curl[1], curl[curl.index("-d") + 1]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    with subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            started = next(line for line in server.stderr if line.startswith("serving "))
            url = started.split()[-1]
            asked = urllib.request.Request(
                address.replace("http://127.0.0.1:8000", url), body.encode(), {"Content-Type": "application/json"}
            )
            answer = json.load(urllib.request.urlopen(asked, timeout=60))
            assert answer["choices"][0]["text"]
            assert b"<title>" in urllib.request.urlopen(url, timeout=60).read()
            server.send_signal(signal.SIGTERM)
            server.stderr.read()
            assert server.wait(60) == 0
        finally:
            server.kill()


def check_python(folder: Path) -> None:
    (code,) = blocks("python")
    out = run([sys.executable, "-c", code + "\nprint(trace[0].expert_ids.shape == (tokens.numel(), 4))\n"], folder)
    assert out.endswith("True\n")
