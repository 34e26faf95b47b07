"""LangChain's ``ChatOpenAI`` against the local API of an edge, if it is installed:

pip install langchain-openai    # not pinned: it brings twenty packages for one test
"""

from __future__ import annotations

import httpx
import pytest
from fake_pair import fake_runtime, text_of

from wispprof.edge.local_api import make_edge_app
from wispprof.types import Sampling

langchain_openai = pytest.importorskip("langchain_openai")


async def test_chat_openai_streams_with_stop_strings_seed_and_max_tokens() -> None:
    expected = text_of("hello", 24, Sampling(0.9, 0, 0.8, seed=7))
    stop = expected[9:11]
    async with fake_runtime() as runtime:
        transport = httpx.ASGITransport(make_edge_app(runtime))
        async with httpx.AsyncClient(transport=transport) as http:

            def model(**more: object):  # type: ignore[no-untyped-def]
                return langchain_openai.ChatOpenAI(
                    model=runtime.model,
                    base_url="http://localhost/v1",
                    api_key="none",
                    http_async_client=http,
                    temperature=0.9,
                    top_p=0.8,
                    seed=7,
                    max_tokens=24,
                    **more,
                )

            whole = await model().ainvoke("hello")
            chunks = [chunk async for chunk in model(stream_usage=True).astream("hello")]
            stopped = [chunk async for chunk in model(stop=[stop, "never"]).astream("hello")]
    assert whole.content == expected
    assert whole.usage_metadata["output_tokens"] == 24
    assert whole.response_metadata["finish_reason"] == "length"
    assert "".join(chunk.content for chunk in chunks) == expected
    assert sum((chunk.usage_metadata or {}).get("output_tokens", 0) for chunk in chunks) == 24
    assert "".join(chunk.content for chunk in stopped) == expected[: expected.index(stop)]
    reasons = [chunk.response_metadata.get("finish_reason") for chunk in stopped]
    assert [reason for reason in reasons if reason] == ["stop"]
