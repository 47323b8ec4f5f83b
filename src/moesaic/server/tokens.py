"""POST /tokenize and /detokenize, as vLLM has them."""

from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from moesaic.server.chat import check_variables
from moesaic.server.context import Context
from moesaic.server.errors import refuse
from moesaic.server.generation import while_connected
from moesaic.server.large_json import json_response, off_the_loop
from moesaic.server.limits import read_request
from moesaic.server.prompts import chat_prompt, template_messages, template_tools, text_prompt
from moesaic.server.schemas import DetokenizeRequest, TokenizeRequest


async def tokenize(context: Context, http: HttpRequest) -> Response:
    body = await read_request(http, TokenizeRequest, max_body=context.max_body)
    context.check_model(body.model)
    ids = await while_connected(http.receive, _ids(context, body))
    told: dict[str, Any] = {"count": len(ids), "max_model_len": context.max_model_tokens, "tokens": ids}
    if body.return_token_strs:
        told["token_strs"] = await off_the_loop(len(ids), lambda: [context.token_texts.text_of(one) for one in ids])
    return await while_connected(http.receive, json_response(told, len(ids)))


async def detokenize(context: Context, http: HttpRequest) -> Response:
    body = await read_request(http, DetokenizeRequest, max_body=context.max_body)
    context.check_model(body.model)
    size, highest = context.tokenizer.vocab_size, max(body.tokens, default=0)
    if highest >= size:
        raise refuse("tokens", f"{highest} is not a token id; there are 0 to {size - 1}")
    text = await while_connected(http.receive, context.texts.run(context.tokenizer.decode, body.tokens))
    return JSONResponse({"prompt": text})


async def _ids(context: Context, body: TokenizeRequest) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise refuse("prompt", "give either prompt or messages")
    if body.prompt is not None:
        return await text_prompt(context, body.prompt, body.add_special_tokens is not False)
    variables = body.chat_template_kwargs or {}
    check_variables(variables)
    return await chat_prompt(
        context,
        lambda: template_messages(body.messages or []),
        tools=template_tools(body.tools),
        variables=variables,
        add_generation_prompt=body.add_generation_prompt is not False,
        add_special_tokens=bool(body.add_special_tokens),
    )
