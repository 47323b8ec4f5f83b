"""What is asked and answered on the page, and what goes wrong."""

import json
from dataclasses import replace
from typing import Any

import pytest

from ..helpers import Running, make_model, make_tokenizer, serving
from .visits import (
    CHAT,
    ENGINE,
    PAGE_CONFIG,
    Visit,
    expect,
    finished,
    needs_browser,
    opened,
    picture_of,
    set_up,
    stubbed,
    write,
)

pytestmark = needs_browser


def test_a_message_is_answered_token_by_token(visit: Visit, server: Running) -> None:
    page = opened(visit, server)
    set_up(page, max_tokens=150)
    write(page, "many small experts")
    finished(page)
    expect(page.locator(".meta")).to_contain_text("150 tokens · ")
    expect(page.locator(".meta")).to_contain_text("reached the most tokens")
    expect(page.locator("#running")).to_have_text("0")
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator("#cache")).to_be_hidden()
    assert page.locator(".token.coloured").count() == 150


@pytest.mark.parametrize("how", ["Escape", "button"])
def test_the_picture_lives_and_stopping_keeps_the_text(visit: Visit, server: Running, how: str) -> None:
    page = opened(visit, server)
    set_up(page, max_tokens=3900)
    empty = picture_of(page, "#map canvas")
    write(page, "go on")
    expect(page.locator("#stop")).to_be_visible()
    expect(page.locator("article")).to_have_attribute("aria-busy", "true")
    expect(page.locator(".token").nth(5)).to_be_attached()
    early = page.locator(".token").count()
    expect(page.locator(".token").nth(early + 20)).to_be_attached()
    expect(page.locator("#running")).to_have_text("1")
    expect(page.locator("#rate")).not_to_have_text("0")
    expect(page.locator("#readout")).to_contain_text("Busiest: layer")
    assert picture_of(page, "#map canvas") != empty
    if how == "Escape":
        page.keyboard.press("Escape")
    else:
        page.click("#stop")
    finished(page)
    expect(page.locator(".meta")).to_contain_text("stopped")
    assert page.locator(".token").count() < 3900
    server.wait_until(lambda: server.service.statistics().running == 0)
    assert server.service.statistics().kv_blocks_used == 0
    set_up(page, max_tokens=20)
    page.click(".meta button")
    expect(page.locator(".meta")).to_contain_text("20 tokens · ")
    expect(page.locator(".answer")).to_have_count(1)


def test_a_refused_message_is_explained_and_given_back(visit: Visit, server: Running) -> None:
    page = opened(visit, server)
    long = "word " * 900
    page.fill("#prompt", long)
    page.press("#prompt", "Enter")
    alert = page.locator("#error")
    expect(alert).to_be_visible()
    told = server.chat(long, max_tokens=512).json()["error"]["message"]
    assert alert.inner_text() == told
    assert "4096" in told.replace(",", "")
    expect(page.locator("#prompt")).to_have_value(long)
    expect(page.locator("#welcome")).to_be_visible()
    set_up(page, max_tokens=10)
    page.fill("#prompt", "short")
    page.press("#prompt", "Enter")
    expect(alert).to_be_hidden()
    finished(page)


def test_a_failure_in_the_middle_keeps_what_came(visit: Visit, server: Running) -> None:
    page = opened(visit, server)
    chunk = {"choices": [{"index": 0, "delta": {"content": "half"}}]}
    failure = {"error": {"message": "the text could not be finished; ask again", "type": "server_error"}}
    body = f"data: {json.dumps(chunk)}\n\ndata: {json.dumps(failure)}\n\n"
    page.route(CHAT, lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    write(page, "x")
    expect(page.locator("#error")).to_have_text("the text could not be finished; ask again")
    expect(page.locator(".answer")).to_have_text("half")
    expect(page.locator(".meta")).to_contain_text("ended by an error")


def test_answers_are_text_and_nothing_else(visit: Visit, server: Running) -> None:
    page = opened(visit, server)
    hostile = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    stubbed(page, "<b>", "bold", "</b>", hostile)
    write(page, hostile)
    finished(page)
    assert page.inner_text(".question") == hostile
    assert page.inner_text(".answer") == f"<b>bold</b>{hostile}"
    assert page.locator("#log :is(b, img, script)").count() == 0


def test_tokens_that_share_a_character_are_shown_as_one(visit: Visit, server: Running) -> None:
    page = opened(visit, server)
    sent = [(" T", "T"), ("bytes:\\xc3", ""), ("bytes:\\xa4", "ä"), ("ST", ""), ("OP", "STOP"), ("<|end|>", "")]
    chunks = [
        {"choices": [{"index": 0, "delta": {"content": text}, "logprobs": {"content": [{"token": token}]}}]}
        for token, text in sent
    ]
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)
    page.route(CHAT, lambda route: route.fulfill(body=body, content_type="text/event-stream"))
    write(page, "x")
    finished(page)
    assert page.eval_on_selector_all(".token", "all => all.map(span => span.textContent)") == ["T", "ä", "ST", "OP"]


def test_a_conversation_sends_what_was_said(visit: Visit, server: Running) -> None:
    page = opened(visit, server)
    stubbed(page, "first answer")
    write(page, "one")
    finished(page)
    page.focus("#prompt")
    page.keyboard.type("two")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("lines")
    with page.expect_request(CHAT) as asked:
        page.keyboard.press("Enter")
    sent = asked.value.post_data_json
    assert [(message["role"], message["content"]) for message in sent["messages"]] == [
        ("user", "one"), ("assistant", "first answer"), ("user", "two\nlines"),
    ]  # fmt: skip
    assert sent["stream"] is True
    assert sent["return_routed_experts"] is True
    assert sent["stream_options"] == {"include_usage": True}
    page.click("#new-chat")
    expect(page.locator("article")).to_have_count(0)
    expect(page.locator("#welcome")).to_be_visible()
    with page.expect_request(CHAT) as asked:
        write(page, "three")
    assert len(asked.value.post_data_json["messages"]) == 1


def test_a_key_is_asked_for_and_kept_for_the_tab(visit: Visit, browser: Any) -> None:
    with serving(make_model(PAGE_CONFIG), config=ENGINE, api_keys=["open sesame"]) as server:
        page = visit.open(server)
        expect(page.locator("#key")).to_be_focused()
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        expect(page.locator("#key-error")).to_contain_text("key")
        page.fill("#key", "open sesame")
        page.keyboard.press("Enter")
        expect(page.locator("#link")).to_have_text("live")
        expect(page.locator("#key-form")).to_be_hidden()
        write(page, "x")
        finished(page)
        page.reload()
        expect(page.locator("#link")).to_have_text("live")
        assert page.evaluate("Object.values(localStorage)") == []
        visit.close()


def test_a_model_without_template_goes_on_with_a_text(visit: Visit) -> None:
    with serving(make_model(PAGE_CONFIG), tokenizer=make_tokenizer(None), config=ENGINE) as server:
        page = opened(visit, server)
        expect(page.locator("#facts")).to_contain_text("goes on with the text")
        set_up(page, temperature=0, max_tokens=60)
        expect(page.locator("#system-field")).to_be_hidden()
        with page.expect_request("**/v1/completions"):
            write(page, "Once upon")
        finished(page)
        # A random model's bytes are seldom characters: nothing of the text may get lost with them.
        answer = page.eval_on_selector(".answer", "answer => answer.textContent")
        assert answer == server.complete("Once upon", max_tokens=60).json()["choices"][0]["text"]
        assert page.locator(".token.coloured").count() > 0 or "\ufffd" in answer
        visit.close()


def test_a_dense_model_has_a_chat_and_no_map(visit: Visit) -> None:
    with serving(make_model(replace(PAGE_CONFIG, moe=None, intermediate_size=64))) as server:
        page = opened(visit, server)
        expect(page.locator("#facts")).to_contain_text("dense")
        expect(page.locator("#load")).to_be_hidden()
        set_up(page, max_tokens=10)
        write(page, "x")
        finished(page)
        assert page.locator(".token.coloured").count() == 0
        visit.close()


def test_a_server_that_went_away_is_told_and_found_again(visit: Visit, server: Running) -> None:
    page = opened(visit, server)
    page.route("**/live", lambda route: route.abort())
    page.route(CHAT, lambda route: route.abort())
    write(page, "x")
    expect(page.locator("#error")).to_contain_text("does not answer")
    expect(page.locator("#prompt")).to_have_value("x")
    page.unroute(CHAT)
    page.unroute("**/live")
    page.press("#prompt", "Enter")
    finished(page)
    expect(page.locator("#error")).to_be_hidden()
