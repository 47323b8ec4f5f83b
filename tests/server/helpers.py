"""A real server on a free port of this machine, with a tiny random model, for the time of a test."""

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx
import torch
import uvicorn

from moesaic.config import EngineConfig, ModelConfig, MoEConfig
from moesaic.engine.engine import Engine
from moesaic.engine.service import EngineService
from moesaic.model.transformer import Transformer
from moesaic.server.app import create_app
from moesaic.tokenizer import Tokenizer, byte_tokenizer

TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}\n{% endfor %}"
    "{% if tools %}[tools]{{ tools | tojson }}\n{% endif %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
CONFIG = ModelConfig(
    vocab_size=byte_tokenizer().vocab_size,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=2048,
    initializer_range=0.3,
    moe=MoEConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
)
NAME = "tiny"


def make_tokenizer(template: str | None = TEMPLATE) -> Tokenizer:
    settings = {"chat_template": template} if template is not None else {}
    return Tokenizer(byte_tokenizer()._rust, settings)


def make_model(config: ModelConfig = CONFIG) -> Transformer:
    model = Transformer(config)
    model.init_weights(int(torch.randint(0, 2**31, ())))
    with torch.no_grad():  # the end of a text is never the most likely token, unless a test wants it
        model.lm_head.weight[256] = 0.99 * model.lm_head.weight[255]
    return model


class Running:
    """A server that answers at `url`."""

    def __init__(self, service: EngineService, host: str, port: int) -> None:
        self.service, self.host, self.port = service, host, port
        self.url = f"http://{host}:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.http.post(path, json=body, **options)

    def chat(self, content: str = "many small experts", **fields: Any) -> httpx.Response:
        body = {"model": NAME, "messages": [{"role": "user", "content": content}], "temperature": 0}
        return self.post("/v1/chat/completions", body | fields)

    def complete(self, prompt: Any = "many small experts", **fields: Any) -> httpx.Response:
        return self.post("/v1/completions", {"model": NAME, "prompt": prompt, "temperature": 0} | fields)

    def wait_until(self, condition: Callable[[], bool], seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not so after {seconds} s: {self.service.statistics()}"
            time.sleep(0.01)


@contextmanager
def serving(
    model: Transformer | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    config: EngineConfig | None = None,
    **options: Any,
) -> Iterator[Running]:
    """`options` are those of create_app."""
    model = model if model is not None else make_model()
    service = EngineService(
        Engine(model, tokenizer or make_tokenizer(), config or EngineConfig(max_sequences=8, max_model_tokens=512))
    )
    app = create_app(service, model_name=NAME, **options)
    # Where a socket does not say that it is TCP, asyncio leaves Nagle's algorithm on: 40 ms for each answer.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    settings = uvicorn.Config(app, http="h11", ws="none", log_config=None, lifespan="on", timeout_graceful_shutdown=5)
    server = uvicorn.Server(settings)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
    thread.start()
    running = Running(service, *listener.getsockname()[:2])
    try:
        running.wait_until(lambda: server.started or not thread.is_alive())
        assert server.started
        yield running
    finally:
        running.http.close()
        server.should_exit = True
        thread.join()
        listener.close()


def data_events(text: str) -> list[Any]:
    """The objects of an event stream; [DONE] as it is."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error, after checking that it has the shape that clients expect."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert "Traceback" not in response.text
    return error


def with_eos(token_id: int) -> ModelConfig:
    return replace(CONFIG, eos_token_ids=(token_id,))


logging.getLogger("uvicorn").setLevel(logging.WARNING)
