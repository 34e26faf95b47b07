"""Whatever value a field has, both endpoints refuse it alike, or the answer shows that it counted."""

from __future__ import annotations

import json
from typing import Any

from fuzzing import ServedPair, fuzz
from hypothesis import given
from hypothesis import strategies as st

VALUES: dict[str, st.SearchStrategy[Any]] = {
    "max_tokens": st.sampled_from([1, 2, 7, 0, -1, 1 << 63, 1.5, "3"]),
    "min_tokens": st.sampled_from([0, 2, 5, 100, -1]),
    "temperature": st.sampled_from([0, 0.5, 1, 2, -1, 1e-300, 1e9]),
    "top_p": st.sampled_from([1, 0.5, 1e-9, 0, 2]),
    "top_k": st.sampled_from([-1, 0, 1, 5, 1 << 31, 1 << 63, -2]),
    "min_p": st.sampled_from([0, 0.5, 1, -1, 2]),
    "seed": st.sampled_from([0, 5, -5, (1 << 63) - 1, 1 << 63, 1 << 80]),
    "stop": st.sampled_from(["ź", ["ź", "ž"], "", ["x"] * 17, "y" * 257, 5]),
    "stop_token_ids": st.sampled_from([[1, 2, 3], [255], [256], [-1], [1 << 70], "x"]),
    "ignore_eos": st.sampled_from([True, False, "x"]),
    "n": st.sampled_from([1, 2, 8, 0, 9, 1 << 40]),
    "echo": st.booleans(),
    "logprobs": st.sampled_from([None, 0, 1, 5, 21, -1]),
    "presence_penalty": st.sampled_from([0, 1]),
    "frequency_penalty": st.sampled_from([0, 0.5]),
    "repetition_penalty": st.sampled_from([1, 1.2]),
    "logit_bias": st.sampled_from([{}, {"5": 10}]),
    "best_of": st.sampled_from([1, 3]),
    "suffix": st.sampled_from(["", "end"]),
    "response_format": st.sampled_from([{"type": "text"}, {"type": "json_object"}]),
    "guided_regex": st.just("a+"),
    "user": st.sampled_from(["me", ""]),
    "unheard_of": st.just(1),
}
REQUESTS = st.lists(st.sampled_from(sorted(VALUES)), min_size=1, max_size=3, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: VALUES[name] for name in names})
)
BASE = {"prompt": "fields", "max_tokens": 6, "seed": 3, "temperature": 0.7, "ignore_eos": True}
NEUTRAL = {"presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1, "logit_bias": {}}
NEUTRAL |= {"best_of": 1, "suffix": "", "response_format": {"type": "text"}}
NOT_SUPPORTED = (*NEUTRAL, "guided_regex", "unheard_of")


def answer(pair: ServedPair, url: str, body: dict[str, Any]) -> tuple[int, Any]:
    response = pair.request(f"{url}/v1/completions", content=json.dumps(body))
    whole = response.json()
    if response.status_code >= 400:
        return response.status_code, whole["error"]["param"]
    names = ("index", "text", "logprobs", "finish_reason", "stop_reason")
    choices = [{name: choice.get(name) for name in names} for choice in whole["choices"]]
    return 200, (choices, whole["usage"]["completion_tokens"])


@fuzz(40)
@given(fields=REQUESTS)
def test_a_field_counts_or_is_refused(pair: ServedPair, fields: dict[str, Any]) -> None:
    body = {**BASE, **fields}
    status, found = answer(pair, pair.server_url, body)
    assert (status, found) == answer(pair, pair.edge_url, body), f"the endpoints differ: {fields}"
    if status != 200:
        assert status == 400
        assert found in fields
        return
    choices, tokens = found
    assert not [name for name in fields if name in NOT_SUPPORTED and fields[name] != NEUTRAL.get(name)]
    texts = [choice["text"].removeprefix("fields" if body.get("echo") else "") for choice in choices]
    assert len(choices) == body.get("n", 1)
    assert tokens <= body["max_tokens"] * len(choices)
    if not fields.keys() & {"stop", "stop_token_ids"} and body["max_tokens"] < 80:
        assert tokens == body["max_tokens"] * len(choices)
    if body.get("echo"):
        assert all(choice["text"].startswith("fields") for choice in choices)
    stops = body.get("stop") or []
    for stop in [stops] if isinstance(stops, str) else stops:
        assert not any(stop in text for text in texts)
    assert all((choice["logprobs"] is not None) == (body.get("logprobs") is not None) for choice in choices)
    greedy = body["temperature"] == 0
    plain = (
        {**body, "temperature": 0.0}
        if greedy
        else {**body, "seed": body["seed"] + 1 if body["seed"] < 9 else 1}
    )
    _, (others, _) = answer(pair, pair.server_url, plain)
    same_text = [choice["text"] for choice in others] == [choice["text"] for choice in choices]
    assert same_text if greedy else not same_text or body["max_tokens"] < 3
