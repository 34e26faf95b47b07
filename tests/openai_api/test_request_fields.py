"""Every field of the requests of OpenAI and vLLM is honoured, refused or ignored, on both routes."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from openai.types import completion_create_params as completions_params
from openai.types.chat import completion_create_params as chat_params
from scripted_backend import ScriptedBackend, api, chat, complete

from wispprof.openai_api.request_body import ChatCompletionRequest, CompletionRequest
from wispprof.openai_api.request_fields import CHAT, COMPLETIONS, FIELDS, RequestField

MODELS = {CHAT: ChatCompletionRequest, COMPLETIONS: CompletionRequest}
PATHS = {CHAT: "/v1/chat/completions", COMPLETIONS: "/v1/completions"}
LEAST: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "abc"}]},
    COMPLETIONS: {"prompt": "abc"},
}

# A value of each honoured field, and what must differ from the answer or from the request without it.
CHANGES: dict[str, Any] = {
    "model": "m",
    "messages": [{"role": "user", "content": "other"}],
    "prompt": "other",
    "n": 2,
    "seed": 5,
    "tools": [],
    "tool_choice": "none",
    "chat_template_kwargs": {},
    "add_generation_prompt": True,
    "continue_final_message": False,
    "add_special_tokens": False,
    "echo": True,
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 5,
    "min_p": 0.5,
    "max_tokens": 3,
    "max_completion_tokens": 3,
    "min_tokens": 2,
    "stop": "l",
    "stop_token_ids": [108],
    "ignore_eos": True,
    "logprobs": {CHAT: True, COMPLETIONS: 1},
    "top_logprobs": 2,
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
    "return_token_ids": True,
    "stream": True,
    "stream_options": {"include_usage": True},
    "tokens_per_s": 3.0,
    "ttft_ms": 80.0,
    "drafting": False,
}
NEEDS = {
    "top_logprobs": {"logprobs": True},
    "include_stop_str_in_output": {"stop": "l"},
    "stream_options": {"stream": True},
}
# Shown elsewhere: these need a chat template, special tokens, or mean the default.
SHOWN_ELSEWHERE = {
    "model",
    "tools",
    "tool_choice",
    "chat_template_kwargs",
    "add_generation_prompt",
    "continue_final_message",
    "add_special_tokens",
    "skip_special_tokens",
}


def fields(use: str) -> list[Any]:
    return [
        pytest.param(field, endpoint, id=f"{endpoint}-{field.name}")
        for field in FIELDS
        if field.use == use
        for endpoint in field.endpoints
    ]


async def ask(endpoint: str, body: dict[str, Any]) -> tuple[httpx.Response, ScriptedBackend]:
    backend = ScriptedBackend("hello!")
    async with api(backend) as client:
        return await client.post(PATHS[endpoint], json={**LEAST[endpoint], **body}), backend


async def effect(endpoint: str, body: dict[str, Any]) -> Any:
    """What the client sees and what was asked of the engine, without times and random numbers."""
    response, backend = await ask(endpoint, {"seed": 1, **body})
    assert response.status_code == 200, response.text
    text = response.text
    if not response.headers["content-type"].startswith("text/event-stream"):
        whole = response.json()
        text = json.dumps([whole["choices"], whole["usage"]])
    return text.count("data:"), "usage" in text, text if "data:" not in text else "", backend.requests


@pytest.mark.parametrize(("field", "endpoint"), fields("honoured"))
async def test_an_honoured_field_changes_what_it_should(field: RequestField, endpoint: str) -> None:
    value = CHANGES[field.name]
    if isinstance(value, dict) and endpoint in value:
        value = value[endpoint]
    base = NEEDS.get(field.name, {})
    without, given = await effect(endpoint, base), await effect(endpoint, {**base, field.name: value})
    assert (without != given) == (field.name not in SHOWN_ELSEWHERE)


@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS])
def test_the_models_have_exactly_the_honoured_fields(endpoint: str) -> None:
    honoured = {field.name for field in FIELDS if field.use == "honoured" and endpoint in field.endpoints}
    assert set(MODELS[endpoint].model_fields) == honoured
    assert honoured <= set(CHANGES)
    names = [field.name for field in FIELDS if endpoint in field.endpoints]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS])
async def test_openapi_describes_the_fields_and_their_bounds(endpoint: str) -> None:
    async with api(ScriptedBackend()) as client:
        document = (await client.get("/openapi.json")).json()
    body = document["paths"][PATHS[endpoint]]["post"]["requestBody"]
    schema = body["content"]["application/json"]["schema"]
    assert set(schema["properties"]) == set(MODELS[endpoint].model_fields)
    assert schema["additionalProperties"] is False
    assert schema["properties"]["n"] == {
        "default": 1,
        "maximum": 8,
        "minimum": 1,
        "title": "N",
        "type": "integer",
    }
    assert "$defs" not in json.dumps(schema)


@pytest.mark.parametrize(("field", "endpoint"), fields("refused"))
async def test_a_refused_field_is_named(field: RequestField, endpoint: str) -> None:
    for value in ("x", 7, True, [1], {"a": 1}, 0.5):
        response, backend = await ask(endpoint, {field.name: value})
        if any(type(value) is type(neutral) and value == neutral for neutral in field.neutral):
            continue
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, field.name)
        assert error["code"] == "unsupported_parameter"
        assert field.name in error["message"]
        assert not backend.requests
    for neutral in (None, *field.neutral):
        assert (await ask(endpoint, {field.name: neutral}))[0].status_code == 200


@pytest.mark.parametrize(("field", "endpoint"), fields("ignored"))
async def test_an_ignored_field_changes_nothing(field: RequestField, endpoint: str) -> None:
    for value in ("x", 7, True, [1], {"a": 1}):
        assert await effect(endpoint, {field.name: value}) == await effect(endpoint, {})


@pytest.mark.parametrize(("endpoint", "params"), [(CHAT, chat_params), (COMPLETIONS, completions_params)])
def test_every_field_of_openais_client_is_in_the_table(endpoint: str, params: Any) -> None:
    known = {field.name for field in FIELDS if endpoint in field.endpoints}
    theirs = set(params.CompletionCreateParamsBase.__annotations__) | {"stream"}
    assert theirs - known == set()


VLLM = """add_special_tokens allowed_token_ids bad_words cache_salt ec_transfer_params echo frequency_penalty
ignore_eos include_stop_str_in_output kv_transfer_params length_penalty logit_bias logprob_token_ids logprobs
max_tokens min_p min_tokens mm_payload model n presence_penalty priority prompt_logprobs repetition_detection
repetition_penalty request_id response_format return_mm_kwargs return_token_ids return_token_offsets
return_tokens_as_token_ids routed_experts_prompt_start seed session_id skip_special_tokens
spaces_between_special_tokens stop stop_token_ids stream stream_interval stream_options structured_outputs
temperature thinking_token_budget top_k top_p truncate_prompt_tokens truncation_side use_beam_search user
vllm_xargs watermarking"""
VLLM_CHAT = """add_generation_prompt chat_template chat_template_kwargs continue_final_message documents
include_reasoning max_completion_tokens media_io_kwargs messages mm_processor_kwargs parallel_tool_calls
reasoning_effort return_prompt_text tool_choice tools top_logprobs"""
VLLM_COMPLETIONS = "prompt prompt_embeds suffix"


def test_every_field_of_vllms_requests_is_in_the_table() -> None:
    """Those of vLLM 0.32's ChatCompletionRequest and CompletionRequest."""
    for endpoint, more in ((CHAT, VLLM_CHAT), (COMPLETIONS, VLLM_COMPLETIONS)):
        known = {field.name for field in FIELDS if endpoint in field.endpoints}
        assert {*VLLM.split(), *more.split()} - known == set()


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": 1}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": [256]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": "x" * 64}, "prompt"),
        ({"prompt": ["a"] * 129}, "prompt"),
        ({"model": "other"}, "model"),
        ({"model": 1}, "model"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 1, "echo": True}, "echo"),
        ({"tokens_per_s": 0}, "tokens_per_s"),
        ({"tokens_per_s": 1e300}, "tokens_per_s"),
        ({"ttft_ms": 5e-324}, "ttft_ms"),
        ({"seed": 1 << 63}, "seed"),
        ({"seed": 10**400}, "seed"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"n": True}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"min_tokens": 20}, "min_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1 << 63}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", 1]}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": "a" * 257}, "stop"),
        ({"stop_token_ids": [256]}, "stop_token_ids"),
        ({"stop_token_ids": [1 << 70]}, "stop_token_ids"),
        ({"stop_token_ids": [1] * 129}, "stop_token_ids"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"other": 1}}, "stream_options"),
        ({"max_token": 5}, "max_token"),
        ({"messages": []}, "messages"),
        ({"top_logprobs": 2}, "top_logprobs"),
    ],
)
async def test_invalid_completions(body: dict[str, Any], param: str) -> None:
    response = await complete(ScriptedBackend(), **body)
    assert response.status_code == (404 if body.get("model") == "other" else 400)
    error = response.json()["error"]
    assert error["param"] == param
    assert error["type"] in ("invalid_request_error", "not_found_error")


@pytest.mark.parametrize(
    ("message", "where"),
    [
        ("text", "messages[0]"),
        ({"content": "x"}, "messages[0].role"),
        ({"role": 1, "content": "x"}, "messages[0].role"),
        ({"role": "user", "content": 5}, "messages[0].content"),
        ({"role": "user", "content": ["x"]}, "messages[0].content[0]"),
        ({"role": "user", "content": [{"type": ["text"], "text": "x"}]}, "messages[0].content[0].type"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "messages[0].content[0].type"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "messages[0].content[0].text"),
        ({"role": "assistant", "tool_calls": 1}, "messages[0].tool_calls"),
        ({"role": "assistant", "tool_calls": [{}]}, "messages[0].tool_calls[0].function"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
    ],
)
async def test_invalid_messages(message: Any, where: str) -> None:
    response = await chat(ScriptedBackend(), message)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "messages")
    assert error["message"].startswith(where + " ")


async def test_messages_reach_the_prompt() -> None:
    backend = ScriptedBackend()
    parts = [{"type": "text", "text": "two"}, {"type": "text", "text": " parts"}]
    await chat(backend, {"role": "user", "content": parts}, {"role": "assistant", "content": None})
    assert bytes(backend.requests[0].tokens) == b"two parts\n"
    empty = await chat(backend, {"role": "user", "content": None})
    assert (empty.status_code, empty.json()["error"]["param"]) == (400, "messages")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [{"type": "function"}], "tool_choice": "auto"}, "tool_choice"),
        ({"tools": [{"type": "function"}], "tool_choice": "none"}, "tools"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": 3}, "logprobs"),
        ({"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ],
)
async def test_invalid_chats(body: dict[str, Any], param: str) -> None:
    response = await chat(ScriptedBackend(), **body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "a", "user": -Infinity}',
        b'{"prompt": ' + b"[" * 10_000,
    ],
)
async def test_what_is_no_json_objects(data: bytes) -> None:
    async with api(ScriptedBackend()) as client:
        response = await client.post("/v1/completions", content=data)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_json"


async def test_numbers_are_bounded_not_wrapped() -> None:
    backend = ScriptedBackend()
    await complete(backend, top_k=10**9, seed=-5, temperature=1e-300, max_tokens=10**30)
    [asked] = backend.requests
    sampling = asked.sampling
    assert (sampling.top_k, sampling.seed, sampling.temperature, asked.max_new) == (0, 5, 0.01, 61)
    await complete(backend, seed=-(1 << 63), n=2, max_tokens=4.0)
    assert [one.sampling.seed for one in backend.requests[1:]] == [0, 1]
    await complete(backend, seed=(1 << 63) - 1, n=2)
    assert [one.sampling.seed for one in backend.requests[3:]] == [(1 << 63) - 1, 0]
