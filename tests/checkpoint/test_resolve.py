"""What MODEL may be: a run, a Hugging Face directory, a hub id (against a small hub of our own), or a mistake."""

import hashlib
import io
import json
import os
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from moesaic.checkpoint.resolve import ModelSource, _bars_on_terminals, require_weights, resolve_model
from moesaic.checkpoint.save import export_model
from moesaic.config import ModelConfig
from moesaic.errors import MoesaicError, UsageError
from moesaic.model.transformer import Transformer
from moesaic.tokenizer import byte_tokenizer


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
    with pytest.raises(UsageError, match="~nobody-of-that-name is neither"):
        resolve_model("~nobody-of-that-name")
    with pytest.raises(UsageError, match="runs/file is a file"):
        resolve_model("runs/file")


def test_a_directory_has_no_revision_and_needs_no_network(tmp_path: Path) -> None:
    directory = make(tmp_path / "run", {"model": {}})
    assert resolve_model(directory, offline=True).directory == directory
    with pytest.raises(UsageError, match="has no revision v2"):
        resolve_model(directory, revision="v2")


COMMITS = {"main": "0123456789abcdef0123456789abcdef01234567", "v2": "f" * 40}
EXTRA_FILES = {
    "chat_template.jinja": b"{{ messages }}",
    "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
    "pytorch_model.bin": b"pickle",
    "modeling_evil.py": b"import os",
    "tokenizer_evil.py": b"import os",
    "README.md": b"# read me",
    "consolidated.safetensors": b"the same once more",
    "original/model.safetensors": b"the same once more",
    "onnx/config.json": b"{}",
}
TAKEN = ["additional_chat_templates", "chat_template.jinja", "config.json", "generation_config.json"]
TAKEN += ["model.safetensors", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A model of two layers with a byte tokenizer, as it lies on the hub."""
    directory = tmp_path_factory.mktemp("model")
    config = ModelConfig(
        vocab_size=257, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, moe=None,
    )  # fmt: skip
    model = Transformer(config)
    model.init_weights()
    export_model(model, byte_tokenizer(), directory / "out")
    return {file.name: file.read_bytes() for file in (directory / "out").iterdir()} | EXTRA_FILES


class Hub(ThreadingHTTPServer):
    """The part of the hub's HTTP interface that a download uses.

    It holds one model, someone/small, and others that answer with an error or never; `asked` is what was asked.
    """

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files = files
        self.asked: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.shutdown()
        self.server_close()


class Answer(BaseHTTPRequestHandler):
    server: Hub  # type: ignore[assignment]

    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        words = urllib.parse.unquote(self.path.partition("?")[0]).strip("/").split("/")
        files = self.server.files
        match words:
            case ["api", "models", "someone", "small", "revision", revision] if revision in COMMITS:
                siblings = [{"rfilename": name} for name in files]
                self.answer_json({"id": "someone/small", "sha": COMMITS[revision], "siblings": siblings})
            case ["api", "models", "someone", "small", "revision", _]:
                self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
            case ["api", "models", "someone", "small", "tree", commit] if commit in COMMITS.values():
                tree = [
                    {"type": "file", "path": name, "size": len(body), "oid": commit} for name, body in files.items()
                ]
                self.answer_json(tree)
            case ["someone", "small", "resolve", commit, *path] if "/".join(path) in files:
                body = files["/".join(path)]
                self.answer(200, body, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(body).hexdigest()}"'})
            case ["api", "models", "gated", *_]:
                self.answer(403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "ask first"})
            case ["api", "models", "login", *_]:
                self.answer(401, b'{"error": "Invalid credentials"}', {})
            case ["api", "models", "down", *_]:
                self.answer(503, b"<html>\n</html>", {})
            case ["api", "models", "silent", *_]:
                time.sleep(30)
            case _:
                self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def answer_json(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

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
def hub(files: dict[str, bytes]) -> Iterator[Hub]:
    server = Hub(dict(files))
    yield server
    server.close()


SCRIPT = """
import json, pathlib, shutil, sys
import moesaic
from moesaic.checkpoint import resolve
from moesaic.errors import MoesaicError
resolve.HUB_SECONDS = 2.0
generated = lambda name, **options: moesaic.generate(
    moesaic.load(name, **options), moesaic.load_tokenizer(name, **options), "a", max_tokens=4, temperature=0.0
).encode()
resolved = lambda name, **options: resolve.resolve_model(name, **options).directory
for what, name, options in json.loads(sys.argv[1]):
    try:
        if what == "remove":
            (removed,) = pathlib.Path("cache").glob("hub/*/" + name)
            shutil.rmtree(removed) if removed.is_dir() else removed.unlink()
        else:
            print({"generate": generated, "resolve": resolved}[what](name, **options))
    except MoesaicError as error:
        print(type(error).__name__, error)
"""


def step(what: str, name: str = "someone/small", **options: object) -> tuple[str, str, dict[str, object]]:
    return what, name, options


def elsewhere(home: Path, endpoint: str, *steps: tuple[str, str, dict[str, object]]) -> list[str]:
    """What a process of its own, whose hub is `endpoint`, prints: a line for each step, and nothing else at all."""
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()} | {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home / "cache"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(Path(__file__).parents[2] / "src"),
    }
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(steps)],
        env=environment, cwd=home, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert len(lines) == sum(what != "remove" for what, _, _ in steps), result.stdout
    return lines


def test_a_model_is_downloaded_once_and_then_taken_from_the_cache(tmp_path: Path, hub: Hub) -> None:
    (text,) = elsewhere(tmp_path, hub.url, step("generate"))
    assert text.startswith(("b'", 'b"'))
    asked = len(hub.asked)
    assert elsewhere(tmp_path, hub.url, step("generate", offline=True)) == [text]
    assert len(hub.asked) == asked  # offline asks nobody, reachable or not
    hub.close()
    again, directory = elsewhere(tmp_path, hub.url, step("generate", offline=True), step("resolve"))
    assert again == text
    assert sorted(os.listdir(directory)) == TAKEN  # without a network the cache serves as well
    assert Path(directory).name == COMMITS["main"]
    assert not [path for path in hub.asked if "evil" in path or "consolidated" in path or ".bin" in path]


def test_revisions(tmp_path: Path, hub: Hub) -> None:
    named, commit, cached, main, missing = elsewhere(
        tmp_path,
        hub.url,
        step("resolve", revision="v2"),
        step("resolve", revision=COMMITS["v2"]),
        step("resolve", revision="v2", offline=True),
        step("resolve", offline=True),
        step("resolve", revision="v3"),
    )
    assert {named, commit, cached} == {named}
    assert Path(named).name == COMMITS["v2"]
    assert main.startswith("MoesaicError someone/small is not a path here, not in the local cache")
    assert missing.startswith("UsageError revision v3 of someone/small is not a path here and not on the hub")


def test_a_partial_snapshot_is_said(tmp_path: Path, hub: Hub) -> None:
    """As an interrupted download leaves it, or another program that needed some files only."""
    snapshot = f"snapshots/{COMMITS['main']}/"
    first, listed = elsewhere(
        tmp_path,
        hub.url,
        step("generate"),
        step("remove", snapshot + "model.safetensors"),
        step("generate", offline=True),
        step("remove", "trees"),  # the list of files, which only some versions of the library keep
    )
    weights, tokenizer, config, last = elsewhere(
        tmp_path,
        hub.url,
        step("generate", offline=True),
        step("remove", snapshot + "tokenizer.json"),
        step("generate", offline=True),
        step("remove", snapshot + "config.json"),
        step("generate", offline=True),
        step("generate"),
    )
    assert listed.startswith("MoesaicError someone/small is not a path here, not in full in the local cache")
    only_in_part = "MoesaicError someone/small is in the local cache only in part: "
    assert weights == only_in_part + "model.safetensors is missing; run once without --offline"
    assert tokenizer == weights
    assert config == only_in_part + "config.json is missing; run once without --offline"
    assert last == first


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_what_is_not_on_the_hub_is_said(tmp_path: Path, hub: Hub, missing: str) -> None:
    del hub.files[missing]
    (error,) = elsewhere(tmp_path, hub.url, step("generate"))
    assert error.startswith(f"MoesaicError someone/small has no {missing} on the hub")


def test_missing_shards_are_named(tmp_path: Path) -> None:
    directory = make(tmp_path / "model", {"model_type": "qwen3"})
    names = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (directory / "model-1.safetensors").write_bytes(b"")
    with pytest.raises(MoesaicError, match=r"only in part: model-2\.safetensors is missing"):
        require_weights(ModelSource("hf", directory, "a/b"), offline=True)
    require_weights(ModelSource("hf", directory))  # what is wrong with a directory here is for its reader to say


MISTAKES = {
    "someone/smal": "UsageError someone/smal is not a path here and not on the hub, or needs a login",
    "some--one/small": "UsageError some--one/small is not a path here and not a possible hub id",
    "gated/small": "UsageError gated/small is only for those who accepted its terms; accept them",
    "login/small": "MoesaicError login/small: the hub refused this login (",
    "down/small": "MoesaicError down/small is not a path here, not in the local cache, and the hub cannot be reached (",
    "silent/small": "MoesaicError silent/small is not a path here, not in the local cache, and the hub cannot be "
    "reached (no answer in 2 s)",
}


def test_hub_mistakes_are_one_line(tmp_path: Path, hub: Hub) -> None:
    lines = elsewhere(tmp_path, hub.url, *(step("resolve", name) for name in MISTAKES))
    for line, expected in zip(lines, MISTAKES.values(), strict=True):
        assert line.startswith(expected)


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://no-such-host.invalid"])
def test_an_unreachable_hub_is_one_line(tmp_path: Path, endpoint: str) -> None:
    (error,) = elsewhere(tmp_path, endpoint, step("resolve"))
    assert error.startswith("MoesaicError someone/small is not a path here, not in the local cache, and the hub cannot")


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_drawn_on_terminals_only(terminal: bool) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    screen = Screen()
    with _bars_on_terminals()(total=3, file=screen) as bar:
        bar.update(3)
    assert ("3/3" in screen.getvalue()) == terminal
