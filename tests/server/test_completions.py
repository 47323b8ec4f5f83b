"""Completions over HTTP, as lm-evaluation-harness asks for them: echoed prompts, their log-probabilities, token ids."""

import pytest
import torch

from .helpers import NAME, Running, data_events, error_of


def model_logprobs(server: Running, ids: list[int]) -> torch.Tensor:
    """(L - 1,) of each token after the first."""
    with torch.inference_mode():
        logits = server.service.engine.model(torch.tensor([ids]))[0].float()
    return torch.log_softmax(logits[:-1], -1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def test_a_prompt_is_continued(server: Running) -> None:
    answer = server.complete("abc", max_tokens=9).json()
    (choice,) = answer["choices"]
    assert answer["object"] == "text_completion"
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"] is None
    assert answer["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 9,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert server.complete("abc", max_tokens=9, echo=True).json()["choices"][0]["text"] == "abc" + choice["text"]
    assert server.complete([97, 98, 99], max_tokens=9).json()["choices"][0]["text"] == choice["text"]
    assert server.complete("abc").json()["usage"]["completion_tokens"] == 16


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_loglikelihoods_of_prompts_are_those_of_the_model(server: Running, max_tokens: int) -> None:
    texts = ["many small experts", "a picture"]
    prompts = [list(text.encode()) for text in texts]
    answer = server.complete(prompts, max_tokens=max_tokens, echo=True, logprobs=1).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    for text, ids, choice in zip(texts, prompts, answer["choices"], strict=True):
        told = choice["logprobs"]
        assert choice["text"].startswith(text)
        assert len(told["tokens"]) == len(ids) + max_tokens
        first, *rest = told["token_logprobs"]
        assert first is None
        assert told["top_logprobs"][0] is None
        assert rest[: len(ids) - 1] == pytest.approx(model_logprobs(server, ids).tolist(), abs=1e-4)
        assert told["tokens"][: len(ids)] == list(text)
        assert told["text_offset"][: len(ids)] == list(range(len(ids)))
        for token, value, top in list(zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True))[
            1:
        ]:
            assert top[token] == pytest.approx(value, abs=1e-4)
            assert max(top.values()) >= value
            assert len(top) <= 2
    assert answer["usage"]["completion_tokens"] == max_tokens * 2
    if not max_tokens:
        assert [choice["text"] for choice in answer["choices"]] == texts


def test_batches_and_choices_come_in_the_order_of_prompts(server: Running) -> None:
    prompts = ["one", "two", "three"]
    asked = {"max_tokens": 8, "temperature": 1.0, "seed": 11}
    together = server.complete(prompts, n=2, **asked).json()
    alone = [server.complete(prompt, n=2, **asked).json() for prompt in prompts]
    texts = [choice["text"] for answer in alone for choice in answer["choices"]]
    assert [choice["text"] for choice in together["choices"]] == texts
    assert [choice["index"] for choice in together["choices"]] == list(range(6))
    assert together["usage"]["prompt_tokens"] == len("".join(prompts))


def test_a_stream_adds_up_to_the_whole_answer(server: Running) -> None:
    asked = {"prompt": ["ab", "cd"], "max_tokens": 12, "echo": True, "logprobs": 2}
    whole = server.complete(**asked).json()
    *chunks, last, done = data_events(
        server.complete(stream=True, stream_options={"include_usage": True}, **asked).text
    )  # fmt: skip
    assert done == "[DONE]"
    assert last["usage"]["completion_tokens"] == 24
    for index, choice in enumerate(whole["choices"]):
        mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(part["text"] for part in mine) == choice["text"]
        for name, values in choice["logprobs"].items():
            streamed = [value for part in mine for value in part["logprobs"][name]]
            if name.endswith("logprobs"):
                continue
            assert streamed == values
        assert mine[-1]["finish_reason"] == choice["finish_reason"]


def test_offsets_count_characters_of_the_text(server: Running) -> None:
    told = server.complete("aäb", max_tokens=0, echo=True, logprobs=0).json()["choices"][0]["logprobs"]
    assert told["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xa4", "b"]
    assert told["text_offset"] == [0, 1, 1, 2]


def test_max_tokens_0_alone_writes_nothing(server: Running) -> None:
    answer = server.complete("abc", max_tokens=0).json()
    assert answer["choices"][0]["text"] == ""
    assert answer["usage"]["completion_tokens"] == 0


def test_structured_outputs_hold_for_every_choice(server: Running) -> None:
    answer = server.complete(["x", "y"], n=2, temperature=1.0, structured_outputs={"regex": "(ab){2,3}"}).json()
    assert {choice["text"] for choice in answer["choices"]} <= {"abab", "ababab"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[1, 2], []]}, "prompt[1]"),
        ({"prompt": [1, 257]}, "prompt"),
        ({"prompt": [1, -1]}, "prompt[1]"),
        ({"prompt": ["a"] * 257}, "prompt"),
        ({"prompt": ["a"] * 20, "n": 16}, "n"),
        ({"prompt": "x" * 600}, "prompt"),
        ({"prompt": "x", "max_tokens": 600}, "max_tokens"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"logprobs": 21}, "logprobs"),
        ({"logit_bias": {"257": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": [""]}, "stop[0]"),
        ({"n": 17}, "n"),
        ({"n": 0}, "n"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"temperature": -0.1}, "temperature"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"guided_regex": "("}, "guided_regex"),
    ],
)
def test_what_is_wrong_is_refused_by_name(server: Running, fields: dict, param: str) -> None:
    error = error_of(server.post("/v1/completions", {"prompt": "abc"} | fields), 400)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert error_of(server.post("/v1/completions", {"prompt": "abc", "stream": True} | fields), 400)["param"] == param


def test_harmless_fields_and_nulls_are_accepted(server: Running) -> None:
    harmless = {"user": "me", "metadata": {"a": 1}, "store": True, "service_tier": "auto", "best_of": 1}
    nulls = dict.fromkeys(["stop", "suffix", "logprobs", "seed", "n", "logit_bias", "stream_options", "unheard_of"])
    assert server.complete(max_tokens=1, **harmless, **nulls).status_code == 200


def test_tokenize_and_detokenize_are_inverse(server: Running) -> None:
    text = "many ümlauts"
    told = server.post("/tokenize", {"model": NAME, "prompt": text}).json()
    assert told == {"count": 13, "max_model_len": 512, "tokens": list(text.encode())}
    assert server.post("/detokenize", {"model": NAME, "tokens": told["tokens"]}).json() == {"prompt": text}
    asked = {"messages": [{"role": "user", "content": "a"}], "add_generation_prompt": False}
    assert bytes(server.post("/tokenize", asked).json()["tokens"]) == b"[user]a\n"
    assert error_of(server.post("/detokenize", {"tokens": [257]}), 400)["param"] == "tokens"
    assert error_of(server.post("/tokenize", {"prompt": "a", **asked}), 400)["param"] == "prompt"
