"""What MODEL may be: a run, a Hugging Face directory, a hub id (against a small hub of our own), or a mistake."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from moesaic.checkpoint.resolve import resolve_model
from moesaic.errors import MoesaicError, UsageError


def make(directory: Path, config: dict[str, object] | None) -> Path:
    (directory / "states").mkdir(parents=True)
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_runs_and_hugging_face_directories_are_told_apart(tmp_path: Path) -> None:
    run = resolve_model(make(tmp_path / "run", {"model": {}}))
    assert (run.kind, run.directory) == ("run", tmp_path / "run")
    hf = resolve_model(str(make(tmp_path / "hf", {"model_type": "qwen3"})))
    assert (hf.kind, hf.directory) == ("hf", tmp_path / "hf")


def test_a_directory_of_runs_names_them(tmp_path: Path) -> None:
    for name in ("sparse", "dense"):
        make(tmp_path / "demo" / name, {"model": {}})
    with pytest.raises(UsageError) as caught:
        resolve_model(tmp_path / "demo")
    demo = tmp_path / "demo"
    assert str(caught.value) == f"{demo} holds runs: {demo}/dense, {demo}/sparse; name one"


@pytest.mark.parametrize(
    ("config", "kind", "message"),
    [(None, UsageError, "has no config.json"), ({"layers": 3}, MoesaicError, "neither model_type .* nor model")],
)
def test_directories_that_are_no_models(
    tmp_path: Path, config: dict[str, object] | None, kind: type[MoesaicError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        resolve_model(make(tmp_path / "x", config))


def test_broken_config_is_named(tmp_path: Path) -> None:
    (make(tmp_path / "x", {}) / "config.json").write_text("{")
    with pytest.raises(MoesaicError, match=r"config\.json is not valid JSON"):
        resolve_model(tmp_path / "x")


def test_unknown_paths_suggest_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "runs" / "demo", {"model": {}})
    (tmp_path / "runs" / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"runs/dmeo is neither a run directory.*did you mean runs/demo?"):
        resolve_model("runs/dmeo")  # also the form of a hub id: no download is tried
    with pytest.raises(UsageError, match=r"did you mean runs?"):
        resolve_model("rums")
    with pytest.raises(UsageError, match="nowhere does not exist"):
        resolve_model("./nowhere/model")
    with pytest.raises(UsageError, match="runs/file is a file"):
        resolve_model("runs/file")


FILES = {
    "config.json": b'{"model_type": "qwen3"}',
    "model.safetensors": b"weights",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "pytorch_model.bin": b"pickle",
    "modeling_evil.py": b"import os",
    "README.md": b"# read me",
}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's HTTP interface that a download uses; it holds one model, someone/small."""

    def do_GET(self) -> None:
        prefix = f"/someone/small/resolve/{COMMIT}/"
        if self.path.startswith("/api/models/someone/small/revision/main"):
            siblings = [{"rfilename": name} for name in FILES]
            body = json.dumps({"id": "someone/small", "sha": COMMIT, "siblings": siblings}).encode()
            self.answer(200, body, {"Content-Type": "application/json"})
        elif self.path.startswith(f"/api/models/someone/small/tree/{COMMIT}"):
            tree = [{"type": "file", "path": name, "size": len(body), "oid": COMMIT} for name, body in FILES.items()]
            self.answer(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
        elif self.path.startswith(prefix) and self.path.removeprefix(prefix) in FILES:
            body = FILES[self.path.removeprefix(prefix)]
            self.answer(200, body, {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(body).hexdigest()}"'})
        else:
            self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def resolve_elsewhere(hub_id: str, endpoint: str, home: Path, *arguments: str) -> str:
    """Resolves in a process of its own, whose hub is `endpoint`; what it printed: the directory or the error."""
    script = (
        "import sys\n"
        "from moesaic.checkpoint.resolve import resolve_model\n"
        "from moesaic.errors import MoesaicError\n"
        "try:\n"
        "    print(resolve_model(sys.argv[1], offline='offline' in sys.argv).directory)\n"
        "except MoesaicError as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()} | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home / "cache"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    result = subprocess.run(
        [sys.executable, "-c", script, hub_id, *arguments],
        env=environment, cwd=home, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_hub_downloads_safetensors_and_text_only(tmp_path: Path, hub: str) -> None:
    directory = Path(resolve_elsewhere("someone/small", hub, tmp_path))
    assert sorted(os.listdir(directory)) == [
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert (directory / "model.safetensors").read_bytes() == b"weights"
    unreachable = "http://127.0.0.1:9"
    assert resolve_elsewhere("someone/small", unreachable, tmp_path, "offline") == str(directory)


def test_hub_mistakes_are_one_line(tmp_path: Path, hub: str) -> None:
    missing = resolve_elsewhere("someone/smal", hub, tmp_path)
    assert missing.startswith("UsageError someone/smal is not a path here and not on the hub")
    impossible = resolve_elsewhere("some--one/small", hub, tmp_path)
    assert impossible.startswith("UsageError some--one/small is not a path here and not a possible hub id")
    unreachable = resolve_elsewhere("someone/small", "http://127.0.0.1:9", tmp_path)
    assert unreachable.startswith("MoesaicError someone/small is not a path here, not in the local cache")
    offline = resolve_elsewhere("someone/small", hub, tmp_path, "offline")
    assert offline.startswith("MoesaicError someone/small is not a path here, not in the local cache")
    assert all("\n" not in text for text in (missing, impossible, unreachable, offline))
