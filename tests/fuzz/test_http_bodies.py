"""Requests that no schema describes: odd values in every known field, and bytes that are hardly JSON."""

from __future__ import annotations

import json
from typing import Any

from fuzzing import ServedPair, fuzz
from hypothesis import given
from hypothesis import strategies as st

FIELDS = (
    *("model", "prompt", "messages", "max_tokens", "max_completion_tokens", "min_tokens", "temperature"),
    *("top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos", "stream", "stream_options"),
    *("n", "best_of", "echo", "suffix", "logprobs", "top_logprobs", "presence_penalty", "frequency_penalty"),
    *("repetition_penalty", "logit_bias", "response_format", "tools", "tool_choice", "functions", "user"),
    *("guided_json", "guided_regex", "tokens_per_s", "ttft_ms", "metadata", "skip_special_tokens"),
)
NUMBERS = st.sampled_from(
    [
        *(0, 1, -1, 2, 7, 255, 256, 1 << 31, 1 << 32, 1 << 63, -(1 << 63), 1 << 64, 1 << 80, 10**400),
        *(0.0, -0.0, 0.5, 1.0, 1.5, 5e-324, 1e308, float("nan"), float("inf"), -float("inf")),
    ]
)
TEXTS = st.sampled_from(["", "a", "\ud800", "\x00", "\u200d", "é", "x" * 300, "</s>", "{{", "🙂"])
SCALARS = NUMBERS | TEXTS | st.none() | st.booleans()
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["role", "content", "type", "text", "name"]), inner, max_size=4)
    ),
    max_leaves=8,
)
REQUESTS = st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=5)
PATHS = st.sampled_from(["/v1/completions", "/v1/chat/completions"])
RAW = st.one_of(
    st.binary(max_size=200),
    st.integers(1, 3000).map(lambda depth: b"[" * depth),
    st.integers(1, 3000).map(lambda depth: b'{"prompt":' * depth),
    st.sampled_from(
        [
            b"",
            b"null",
            b'"text"',
            b"[]",
            b'\xef\xbb\xbf{"prompt": "a"}',
            b'{"prompt": "\xff"}',
            b'{"prompt": "a", "prompt": ["b"]}',
            b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
            '{"prompt": "a"}'.encode("utf-16"),
        ]
    ),
)


def body_of(path: str, fields: dict[str, Any]) -> bytes:
    """The fields over a request that is valid without them."""
    valid: dict[str, Any] = {"max_tokens": 4}
    if path.endswith("chat/completions"):
        valid["messages"] = [{"role": "user", "content": "abc"}]
    else:
        valid["prompt"] = "abc"
    return json.dumps({**valid, **fields}).encode()


@fuzz(30)
@given(path=PATHS, fields=REQUESTS)
def test_odd_values(pair: ServedPair, path: str, fields: dict[str, Any]) -> None:
    answers = []
    for url in (pair.server_url, pair.edge_url):
        headers = {"content-type": "application/json"}
        response = pair.request(url + path, content=body_of(path, fields), headers=headers)
        if response.status_code >= 400:
            assert set(response.json()["error"]) >= {"message", "type", "param", "code"}
        answers.append(response.status_code)
    pair.logs.check()


@fuzz(15)
@given(
    path=PATHS, body=RAW, kind=st.sampled_from(["application/json", "text/plain", "multipart/form-data", ""])
)
def test_bytes_that_are_hardly_json(pair: ServedPair, path: str, body: bytes, kind: str) -> None:
    for url in (pair.server_url, pair.edge_url):
        response = pair.request(url + path, content=body, headers={"content-type": kind})
        if response.status_code >= 400:
            assert set(response.json()["error"]) >= {"message", "type", "param", "code"}
    pair.logs.check()


def test_both_endpoints_still_answer_exactly(pair: ServedPair) -> None:
    pair.check()
