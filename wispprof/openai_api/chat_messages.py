"""Messages of a conversation, checked and in the form that chat templates expect."""

from __future__ import annotations

import json
from typing import Any

from wispprof.openai_api.api_error import ApiError


def template_messages(messages: list[Any]) -> list[dict[str, Any]]:
    """``messages`` with plain text as content and tool arguments as objects; every other field stays.

    Raises :class:`ApiError` for what is no message, or has content besides text.
    """
    return [_message(message, f"messages[{place}]") for place, message in enumerate(messages)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise _invalid(where, "must be an object")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise _invalid(f"{where}.role", "must be a string")
    given = {name: value for name, value in message.items() if value is not None}
    given["content"] = _text(message.get("content"), f"{where}.content")
    if "tool_calls" in given:
        given["tool_calls"] = _tool_calls(given["tool_calls"], f"{where}.tool_calls")
    return given


def _text(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _invalid(where, "must be a string or a list of parts")
    texts: list[str] = []
    for place, part in enumerate(content):
        at = f"{where}[{place}]"
        if not isinstance(part, dict):
            raise _invalid(at, "must be an object")
        if part.get("type") != "text":
            raise _invalid(f"{at}.type", "must be 'text': only text content is supported")
        if not isinstance(part.get("text"), str):
            raise _invalid(f"{at}.text", "must be a string")
        texts.append(part["text"])
    return "".join(texts)


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list):
        raise _invalid(where, "must be a list")
    return [_tool_call(call, f"{where}[{place}]") for place, call in enumerate(calls)]


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _invalid(f"{where}.function", "must be an object with a name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        # Clients send JSON text; templates write the object.
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError:
            raise _invalid(f"{where}.function.arguments", "must be JSON") from None
    if not isinstance(arguments, dict):
        raise _invalid(f"{where}.function.arguments", "must be a JSON object")
    return {**call, "function": {**function, "arguments": arguments}}


def _invalid(where: str, reason: str) -> ApiError:
    return ApiError(f"{where} {reason}.", param="messages", code="invalid_value")
