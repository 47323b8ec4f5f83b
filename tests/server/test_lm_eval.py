"""lm-evaluation-harness: the same scores through the server as by the adapter that asks the engine itself."""

import importlib
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.config import EngineConfig
from moesaic.errors import MoesaicError, UsageError
from moesaic.model.transformer import Transformer
from moesaic.tokenizer import Tokenizer

from .helpers import NAME, Running, make_model, make_tokenizer, serving

MAX_TOKENS = 160
CONFIG = EngineConfig(max_sequences=8, max_model_tokens=MAX_TOKENS)
WORDS = ("many", "small", "experts", "choose", "one", "picture", "of", "größer", "and", "tokens", "in", "a", "row")
CHOICES = """
task: moesaic_choices
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}, cache_dir: CACHE}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
WRITING = """
task: moesaic_writing
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}, cache_dir: CACHE}
test_split: test
output_type: generate_until
doc_to_text: ">{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs: {until: ["a", "zz", "qq", "\\n\\n", "<|im_end|>"], max_gen_toks: 24}
metric_list: [{metric: exact_match}]
"""
TEXTS = """
task: moesaic_texts
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}, cache_dir: CACHE}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}, {metric: bits_per_byte}]
"""


def imported(name: str) -> Any:
    """A module of the harness, which not everybody who runs the tests, or checks their types, has."""
    pytest.importorskip("lm_eval", reason="needs moesaic[clients]")
    return importlib.import_module(name)


def adapter(*arguments: Any, **options: Any) -> Any:
    return imported("moesaic.engine.harness").MoesaicLM(*arguments, **options)


def asking(kind: str, arguments: tuple[Any, ...], index: int = 0) -> Any:
    return imported("lm_eval.api.instance").Instance(kind, {}, arguments, index)


def words(count: int) -> str:
    return " ".join(random.choices(WORDS, k=count))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A folder of tasks. Questions are short, empty and too long; texts need up to four windows."""
    random.seed(request.config.option.seed)
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"question": question, "choices": [words(n) for n in (1, 2, 1, 6)], "answer": i % 4, "text": words(length)}
        for i, (question, length) in enumerate(
            [("", 1), (words(1) + "  ", 5), (words(3), 20), (words(8), 60), (words(40), 80), ("größer", 3)]
        )
    ]
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for index, task in enumerate((CHOICES, WRITING, TEXTS)):
        text = task.replace("DATA", json.dumps(str(data))).replace("CACHE", json.dumps(str(folder / "cache")))
        (folder / f"{index}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest) -> Transformer:
    """Its texts may end everywhere: then the server has no token to tell."""
    torch.manual_seed(request.config.option.seed)
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[256] = 6 * model.lm_head.weight[255]
    return model


@pytest.fixture(scope="module")
def server(model: Transformer) -> Iterator[Running]:
    with serving(model, config=CONFIG) as running:
        yield running


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def evaluated(
    model: Any, folder: Path, names: list[str], **options: Any
) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Scores by task, and of each task what the model answered, in the order of the documents."""
    manager = imported("lm_eval.tasks").TaskManager(include_path=str(folder), include_defaults=False)
    found = imported("lm_eval").simple_evaluate(
        model=model, tasks=names, task_manager=manager, bootstrap_iters=0, log_samples=True, **options
    )
    answers = {
        name: [sample["filtered_resps"] for sample in sorted(samples, key=lambda sample: sample["doc_id"])]
        for name, samples in found["samples"].items()
    }
    scores = {
        name: {key: value for key, value in result.items() if isinstance(value, float) and "stderr" not in key}
        for name, result in found["results"].items()
    }
    return scores, answers


def numbers(answers: list[Any]) -> list[float]:
    """All log-probabilities of a task, one after the other; behind each, if it is told, whether it is the greatest."""
    values = [value if isinstance(value, tuple | list) else (value,) for answer in answers for value in answer]
    return [float(number) for value in values for number in value]


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("options", [{"batch_size": 4}, {"num_concurrent": 6}], ids=["batches", "concurrent"])
def test_scores_through_the_server_are_those_of_the_engine(
    model: Transformer, server: Running, tasks: Path, options: dict[str, int]
) -> None:
    make_tokenizer().save(tasks / "tokenizer")
    client = imported("lm_eval.models.openai_completions").LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions",
        model=NAME,
        tokenizer=str(tasks / "tokenizer"),
        tokenizer_backend="huggingface",
        max_length=MAX_TOKENS,
        max_retries=1,
        **options,
    )
    names = ["moesaic_choices", "moesaic_writing", "moesaic_texts"]
    scores, answers = evaluated(client, tasks, names)
    direct = adapter(model, make_tokenizer(), CONFIG)
    direct_scores, direct_answers = evaluated(direct, tasks, names)
    direct.close()

    assert set(scores) == set(names)
    for name in names:
        assert scores[name] == pytest.approx(direct_scores[name], rel=1e-5), name
    assert answers["moesaic_writing"] == direct_answers["moesaic_writing"]
    assert any(text for (text,) in answers["moesaic_writing"])
    for name, count in (("moesaic_choices", 48), ("moesaic_texts", 6)):
        assert len(numbers(answers[name])) == count
        assert numbers(answers[name]) == pytest.approx(numbers(direct_answers[name]), abs=1e-4), name
    assert all(value < -1 for value in numbers(answers["moesaic_texts"]))


@pytest.mark.usefixtures("offline")
def test_chats_are_written_by_the_same_template(model: Transformer, server: Running, tasks: Path) -> None:
    client = imported("lm_eval.models.openai_completions").LocalChatCompletion(
        base_url=f"{server.url}/v1/chat/completions", model=NAME, max_retries=1
    )
    # Not the one that is too long, which a server refuses.
    options: dict[str, Any] = {"apply_chat_template": True, "samples": {"moesaic_writing": [0, 1, 2, 3, 5]}}
    scores, answers = evaluated(client, tasks, ["moesaic_writing"], **options)
    direct = adapter(model, make_tokenizer(), CONFIG)
    direct_scores, direct_answers = evaluated(direct, tasks, ["moesaic_writing"], **options)
    assert answers == direct_answers
    assert scores == direct_scores
    messages = [{"role": "user", "content": "why"}, {"role": "assistant", "content": "since "}]
    assert direct.apply_chat_template(messages, add_generation_prompt=False) == "[user]why\n[assistant]since "


def test_each_text_is_scored_as_the_model_has_it(model: Transformer) -> None:
    few = EngineConfig(max_sequences=2, max_waiting=1, max_model_tokens=64)
    direct = adapter(model, make_tokenizer(), few)
    pairs = [(words(random.randrange(4)), " " + words(1)) for _ in range(9)]
    asked = [asking("loglikelihood", pair, i) for i, pair in enumerate(pairs)]
    for (before, after), (value, is_greedy) in zip(pairs, direct.loglikelihood(asked, disable_tqdm=True), strict=True):
        before_ids, after_ids = list(before.encode()) or [256], list(after.encode())
        with torch.inference_mode(), model.evaluating():
            logprobs = model(torch.tensor([before_ids + after_ids]))[0, len(before_ids) - 1 : -1].log_softmax(-1)
        taken = logprobs[range(len(after_ids)), after_ids]
        assert value == pytest.approx(float(taken.sum()), abs=1e-4)
        assert is_greedy == bool((taken == logprobs.amax(-1)).all())


def test_answers_are_drawn_as_the_task_says() -> None:
    direct = adapter(make_model(), make_tokenizer(), CONFIG)

    def answers(**options: Any) -> list[str]:
        asked = asking("generate_until", ("many", {"max_gen_toks": 40} | options))
        return direct.generate_until([asked] * 3, disable_tqdm=True)

    assert len(set(answers())) == 1
    drawn = answers(temperature=0.9, do_sample=True)
    assert len(set(drawn)) == 3
    assert drawn == answers(temperature=0.9, do_sample=True)
    assert drawn[0] != answers(temperature=0.9, do_sample=True, seed=1)[0]
    whole = answers()[0]
    assert answers(until=[whole[3:6]])[0] == whole[: whole.index(whole[3:6])]
    with pytest.raises(UsageError, match="generation_kwargs has num_beams"):
        answers(num_beams=4)
    with pytest.raises(UsageError, match="max_gen_toks is 159"):
        answers(max_gen_toks=MAX_TOKENS - 1)
    assert not direct._engine.has_work


def test_what_fails_is_told_and_leaves_nothing_behind(model: Transformer, monkeypatch: pytest.MonkeyPatch) -> None:
    direct = adapter(model, make_tokenizer(), CONFIG)
    asked = [asking("loglikelihood", (words(4), " a"), i) for i in range(20)]
    with monkeypatch.context() as patch:
        patch.setattr(model, "forward", lambda *_, **__: 1 / 0)
        with pytest.raises(MoesaicError, match="ZeroDivisionError"):
            direct.loglikelihood(asked, disable_tqdm=True)
    direct._engine.step()
    assert not direct._engine.has_work
    assert direct._engine.statistics().kv_blocks_used == 0
    assert len(direct.loglikelihood(asked, disable_tqdm=True)) == 20


def test_the_first_token_comes_once_and_where_the_tokenizer_has_it(model: Transformer) -> None:
    import tokenizers

    rust = tokenizers.Tokenizer.from_str(make_tokenizer().to_json())
    settings = {"bos_token": "<|endoftext|>"}
    plain = adapter(model, Tokenizer(rust, settings), CONFIG)
    assert plain.tok_encode("a") == [97]
    assert adapter(model, Tokenizer(rust, settings), CONFIG, add_bos_token=True).tok_encode("a") == [256, 97]
    rust.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)]
    )
    own = adapter(model, Tokenizer(rust, settings), CONFIG)
    assert own.tok_encode("a") == own.tok_encode("<|endoftext|>a") == [256, 97]
    assert own.tok_encode("a", add_special_tokens=False) == [97]
    assert own._encode_pair("a ", "b") == ([256, 97], [32, 98])
    with pytest.raises(UsageError, match="no bos_token"):
        adapter(model, make_tokenizer(), CONFIG, add_bos_token=True)


def test_without_the_harness_its_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "moesaic.engine.harness", raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match="pip install lm_eval"):
        importlib.import_module("moesaic.engine.harness")


def test_clients_that_score_prompts_find_one_token_after_them(server: Running) -> None:
    """They take it off, whatever it is: without the end of a text, the last token of the prompt would go instead."""
    ended = 0
    for byte in range(64):
        prompt = [97, byte]
        plain = server.complete(prompt, max_tokens=1, ignore_eos=False).json()
        scored = server.complete(prompt, max_tokens=1, echo=True, logprobs=1).json()["choices"][0]
        ended += plain["choices"][0]["finish_reason"] == "stop"
        assert len(scored["logprobs"]["token_logprobs"]) == 3
    assert ended
