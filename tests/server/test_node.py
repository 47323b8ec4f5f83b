"""OpenAI's package for node. It is installed once, into the user's cache folder; without node or npm it is left out."""

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.config import EngineConfig

from .helpers import NAME, TEMPLATE, Running, make_tokenizer, serving

KEY = "a-key"
PACKAGES = ["openai@6.49.0", "zod@4.6.7"]
SCRIPT = Path(__file__).with_name("client.mjs")
Told = tuple[Running, dict[str, Any]]


def packages() -> Path:
    """The folder that has them. Skips where it cannot be made."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("needs node and npm")
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moesaic"
    folder = caches / "+".join(PACKAGES).replace("@", "-")
    if not folder.exists():
        caches.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=caches) as fresh:
            install(Path(fresh) / "packages")
            with contextlib.suppress(OSError):  # another process was faster
                (Path(fresh) / "packages").rename(folder)
    return folder


def install(folder: Path) -> None:
    """Runs nothing that comes with the packages."""
    folder.mkdir()
    (folder / "package.json").write_text("{}")
    options = ["--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=0", "--prefer-offline"]
    try:
        done = subprocess.run(
            ["npm", "install", *options, *PACKAGES], cwd=folder, capture_output=True, text=True, timeout=60
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm did not install {' '.join(PACKAGES)} in 60 s")
    if done.returncode:
        why = "; ".join(line for line in done.stderr.splitlines() if line.startswith("npm error"))
        pytest.skip(f"npm cannot install {' '.join(PACKAGES)}: {why[:200]}")


@pytest.fixture(scope="module")
def told(request: pytest.FixtureRequest) -> Iterator[Told]:
    """The server, and what the script found there."""
    folder = packages()
    torch.manual_seed(request.config.option.seed)
    tokenizer = make_tokenizer(TEMPLATE + "{# calls are written in <tool_call> #}")
    with serving(tokenizer=tokenizer, config=EngineConfig(max_model_tokens=2048), api_keys=[KEY]) as running:
        done = subprocess.run(
            ["node", "--input-type=module", "-", f"{running.url}/v1", KEY, NAME],
            input=SCRIPT.read_text(), cwd=folder, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        yield running, json.loads(done.stdout)


def test_chats_whole_and_streamed(told: Told) -> None:
    found = told[1]
    assert found["models"] == [NAME]
    choice = found["whole"]["choices"][0]
    assert choice["finish_reason"] == "length"
    pieces = [chunk["choices"][0]["delta"].get("content") or "" for chunk in found["pieces"] if chunk["choices"]]
    assert "".join(pieces) == found["gathered"] == choice["message"]["content"] != ""
    assert found["pieces"][-1]["choices"] == []
    assert found["pieces"][-1]["usage"]["completion_tokens"] == found["whole"]["usage"]["completion_tokens"] == 20


def test_tools_and_structured_output(told: Told) -> None:
    found = told[1]
    (call,), (streamed,) = (found[name]["message"]["tool_calls"] for name in ("calls", "streamedCalls"))
    assert found["calls"]["finish_reason"] == found["streamedCalls"]["finish_reason"] == "tool_calls"
    assert call["function"] == {key: streamed["function"][key] for key in ("name", "arguments")}
    assert found["ran"] == [json.loads(call["function"]["arguments"])["city"]]
    assert found["ran"][0] in ("Rome", "Oslo")
    assert set(found["parsed"]) == {"sky", "windy"}
    assert isinstance(found["parsed"]["windy"], bool)


def test_responses_and_completions(told: Told) -> None:
    found = told[1]
    assert found["response"]["status"] == "incomplete"
    deltas = [event["delta"] for event in found["events"] if event["type"] == "response.output_text.delta"]
    assert "".join(deltas) == found["responseText"] != ""
    assert found["completion"]["choices"][0]["text"].startswith("a")
    assert len(found["completion"]["choices"][0]["logprobs"]["token_logprobs"]) == 5


def test_errors_become_the_clients_own(told: Told) -> None:
    found = told[1]
    for name, kind, status, code, param in (
        ("badField", "BadRequestError", 400, None, "temperature"),
        ("badModel", "NotFoundError", 404, "model_not_found", "model"),
        ("badKey", "AuthenticationError", 401, "invalid_api_key", None),
        ("badStream", "BadRequestError", 400, None, "n"),
    ):
        error = found[name]
        assert (error["name"], error["status"], error["code"], error["param"]) == (kind, status, code, param)
        assert error["message"].startswith(f"{status} ")


def test_aborted_texts_are_given_up(told: Told) -> None:
    running, found = told
    assert 5 <= found["beforeAbort"] < 1500  # a few more may have come with the fifth piece
    assert found["aborted"]["name"] == "APIUserAbortError"
    running.wait_until(lambda: running.service.statistics().kv_blocks_used == 0)
    statistics = running.service.statistics()
    assert statistics.running == 0
    assert statistics.finished["cancelled"] == 2
