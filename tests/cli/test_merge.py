"""`moesaic merge` as a user meets it."""

import json
import shlex
from pathlib import Path

import pytest

from moesaic.checkpoint.load import load

from .test_prune import SHORT, Command, moesaic, plain  # noqa: F401  (the last two are fixtures)


def test_alike_experts_become_one(moesaic: Command, plain: Path) -> None:  # noqa: F811
    text, out = plain.with_name("text.txt"), plain.with_name("merged")
    result = moesaic("merge", plain, out, "--keep", "4", "--data", text, *SHORT, "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report["experts"] == {"before": 6, "after": 4}
    assert report["tokens"]["scored"] == 640
    assert set(report["perplexity"]) == {"before", "after"}
    for layer in ("1", "2"):
        clusters, weights = report["clusters"][layer], report["weights"][layer]
        assert sorted(expert for cluster in clusters for expert in cluster) == list(range(6))
        assert [len(each) for each in weights] == [len(cluster) for cluster in clusters]
        assert all(sum(each) == pytest.approx(1) for each in weights)
    assert report["bytes"]["after"] == sum(tensor.nbytes for tensor in load(out).state_dict().values())
    # The leading experts are those that pruning keeps.
    pruned = moesaic("prune", plain, plain.with_name("pruned"), "--keep", "4", "--data", text, *SHORT, "--json")
    leads = {layer: sorted(cluster[0] for cluster in each) for layer, each in report["clusters"].items()}
    assert leads == json.loads(pruned.stdout)["kept"]


def test_it_is_said_in_words_and_the_next_command_runs(moesaic: Command, plain: Path) -> None:  # noqa: F811
    text, out = plain.with_name("text.txt"), plain.with_name("merged")
    result = moesaic("merge", plain, out, "--keep", "3", "--data", text, *SHORT)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == f"wrote {out} as qwen3_moe, 3 of 6 experts a layer, merged by their outputs on 640 tokens"
    assert lines[2].startswith("  perplexity  ")
    assert [line.split(" joins ")[0] for line in lines[3:5]] == ["  layer 1", "  layer 2"]
    printed = shlex.split(result.stdout.split("-m moesaic ")[1])
    assert moesaic(*printed, "--max-tokens", "4").returncode == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--keep 4", "experts are compared on a text; add --data FILE"),
        ("--data TEXT", "--keep"),
        ("--keep 7 --data TEXT", "keep is 7 and each layer has 6 experts; keep from 2 to 5"),
        ("--keep 4 --data nowhere.txt", "--data nowhere.txt is not a file"),
    ],
)
def test_mistakes_get_one_line(moesaic: Command, plain: Path, flags: str, message: str) -> None:  # noqa: F811
    words = [str(plain.with_name("text.txt")) if word == "TEXT" else word for word in flags.split()]
    result = moesaic("merge", plain, plain.with_name("out"), *words)
    assert (result.returncode, result.stderr.count("\n"), result.stdout) == (2, 1, "")
    assert message in result.stderr
    assert not plain.with_name("out").exists()
