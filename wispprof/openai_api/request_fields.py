"""Every field of OpenAI's and vLLM's requests: honoured, refused, or ignored.

Only fields that cannot change the text are ignored. A refused field is accepted with a value that changes
nothing. Any field that is not in the table is refused.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from wispprof.errors import nearest
from wispprof.openai_api.api_error import ApiError

CHAT, COMPLETIONS = "chat", "completions"
BOTH = (CHAT, COMPLETIONS)


class RequestField(NamedTuple):
    """``use``: ``honoured``, ``refused`` or ``ignored``. ``neutral``: values of a refused field that change
    nothing and are accepted, besides null. ``endpoints``: where it is known."""

    name: str
    use: str
    note: str = ""
    neutral: tuple[Any, ...] = ()
    endpoints: tuple[str, ...] = BOTH


def _honoured(name: str, note: str = "", endpoints: tuple[str, ...] = BOTH) -> RequestField:
    return RequestField(name, "honoured", note, (), endpoints)


def _refused(name: str, *neutral: Any, note: str = "", endpoints: tuple[str, ...] = BOTH) -> RequestField:
    return RequestField(name, "refused", note, neutral, endpoints)


def _ignored(name: str, note: str = "", endpoints: tuple[str, ...] = BOTH) -> RequestField:
    return RequestField(name, "ignored", note, (), endpoints)


_CHAT = (CHAT,)
_COMPLETIONS = (COMPLETIONS,)

FIELDS: tuple[RequestField, ...] = (
    # What to generate.
    _honoured("model", "The target's id, or empty. Another name: 404."),
    _honoured(
        "messages", "Text content only; tool turns reach the chat template with all their fields.", _CHAT
    ),
    _honoured("prompt", "Text, token ids, or a list of either.", _COMPLETIONS),
    _honoured("n", "1 to 8. Choice `i` uses `seed + i`."),
    _honoured("seed", "A 64-bit integer; its absolute value counts. None: a random one."),
    _honoured("tools", 'Only with `tool_choice: "none"`: the chat template shows them.', _CHAT),
    _honoured("tool_choice", 'Only `"none"`.', _CHAT),
    _honoured("chat_template_kwargs", "Variables for the chat template.", _CHAT),
    _honoured("add_generation_prompt", "", _CHAT),
    _honoured("continue_final_message", "", _CHAT),
    _honoured("add_special_tokens", "", _COMPLETIONS),
    _honoured("echo", "Not with `logprobs`: prompts have no log-probabilities here.", _COMPLETIONS),
    # How to sample. Defaults are the target's.
    _honoured("temperature", "0 to 2. Between 0 and 0.01 it counts as 0.01."),
    _honoured("top_p", "Above 0, at most 1."),
    _honoured("top_k", "-1 and 0 switch it off."),
    _honoured("min_p", "0 to 1."),
    # When to stop.
    _honoured("max_tokens", "At least 1; cut to what the context leaves."),
    _honoured("max_completion_tokens", "Takes precedence over `max_tokens`.", _CHAT),
    _honoured("min_tokens", "No stop token and no stop string ends the text before."),
    _honoured("stop", "At most 16 strings of at most 256 characters. The text of a special token matches."),
    _honoured("stop_token_ids", "At most 128."),
    _honoured("ignore_eos", "The target's stop tokens do not end the text; `stop_token_ids` do."),
    # What to return.
    _honoured("logprobs", "Completions: 0 to 20 alternatives; chat: true or false."),
    _honoured("top_logprobs", "0 to 20, with `logprobs: true`.", _CHAT),
    _honoured("include_stop_str_in_output"),
    _honoured("skip_special_tokens"),
    _honoured("return_token_ids", "Adds `token_ids` to choices, and `prompt_token_ids`."),
    _honoured("stream"),
    _honoured("stream_options", "`include_usage` and `continuous_usage_stats`."),
    # This project's own.
    _honoured("tokens_per_s", "SLO: token speed asked for."),
    _honoured("ttft_ms", "SLO: time to the first token."),
    _honoured("drafting", "False: no drafts for this answer. A server's own endpoint never drafts."),
    # Refused: they would change the text, the prompt or the response.
    _refused("frequency_penalty", 0),
    _refused("presence_penalty", 0),
    _refused("repetition_penalty", 1),
    _refused("length_penalty", 1),
    _refused("logit_bias", {}),
    _refused("best_of", 1, endpoints=_COMPLETIONS),
    _refused("suffix", "", endpoints=_COMPLETIONS),
    _refused("use_beam_search", False),
    _refused("response_format", {"type": "text"}),
    _refused("structured_outputs"),
    _refused("guided_json"),
    _refused("guided_regex"),
    _refused("guided_choice"),
    _refused("guided_grammar"),
    _refused("guided_decoding_backend"),
    _refused("guided_whitespace_pattern"),
    _refused("functions", [], endpoints=_CHAT),
    _refused("function_call", "none", endpoints=_CHAT),
    _refused("web_search_options", endpoints=_CHAT),
    _refused("audio", endpoints=_CHAT),
    _refused("modalities", ["text"], endpoints=_CHAT),
    _refused("moderation", endpoints=_CHAT),
    _refused("verbosity", "medium", endpoints=_CHAT),
    _refused("reasoning_effort", endpoints=_CHAT),
    _refused("thinking_token_budget", -1),
    _refused("include_reasoning", True, endpoints=_CHAT),
    _refused("chat_template", endpoints=_CHAT),
    _refused("documents", [], endpoints=_CHAT),
    _refused("add_special_tokens", False, endpoints=_CHAT),
    _refused("echo", False, endpoints=_CHAT),
    _refused("return_prompt_text", False, endpoints=_CHAT),
    _refused("media_io_kwargs", {}, endpoints=_CHAT),
    _refused("mm_processor_kwargs", {}, endpoints=_CHAT),
    _refused("prompt_embeds", [], endpoints=_COMPLETIONS),
    _refused("bad_words", []),
    _refused("allowed_token_ids"),
    _refused("logprob_token_ids", []),
    _refused("prompt_logprobs"),
    _refused("return_tokens_as_token_ids", False),
    _refused("return_token_offsets", False),
    _refused("spaces_between_special_tokens", True),
    _refused("truncate_prompt_tokens"),
    _refused("truncation_side"),
    _refused("repetition_detection"),
    _refused("watermarking", False),
    _refused(
        "cache_salt",
        note="Prefixes are shared only within an API key ([Security](../SECURITY.md#what-is-not)).",
    ),
    _refused("priority", 0),
    _refused("kv_transfer_params", {}),
    _refused("ec_transfer_params", {}),
    _refused("routed_experts_prompt_start", 0),
    _refused("vllm_xargs", {}),
    # Ignored: they cannot change the text.
    _ignored("user"),
    _ignored("metadata", endpoints=_CHAT),
    _ignored("store", endpoints=_CHAT),
    _ignored("service_tier", endpoints=_CHAT),
    _ignored("safety_identifier", endpoints=_CHAT),
    _ignored("prediction", "A hint for speed.", _CHAT),
    _ignored("parallel_tool_calls", "No tools are called.", _CHAT),
    _ignored("prompt_cache_key", endpoints=_CHAT),
    _ignored("prompt_cache_options", endpoints=_CHAT),
    _ignored("prompt_cache_retention", endpoints=_CHAT),
    _ignored("request_id"),
    _ignored("session_id"),
    _ignored("stream_interval", "Commits decide the chunks."),
    _ignored("mm_payload"),
    _ignored("return_mm_kwargs"),
)

_KNOWN = {(endpoint, field.name): field for field in FIELDS for endpoint in field.endpoints}


def honoured_fields(endpoint: str, body: dict[str, Any]) -> dict[str, Any]:
    """The honoured fields of ``body`` that are set. Raises :class:`ApiError` for a refused or unknown one."""
    honoured: dict[str, Any] = {}
    for name, value in body.items():
        field = _KNOWN.get((endpoint, name))
        if field is None:
            near = nearest(name[:100], [known for at, known in _KNOWN if at == endpoint])
            said = f"Unknown field {name[:100]!r}. {near}".rstrip()
            raise ApiError(said, param=name[:100], code="unknown_parameter")
        if value is None or field.use == "ignored":
            continue
        if field.use == "honoured":
            honoured[name] = value
        elif not any(_same(value, neutral) for neutral in field.neutral):
            raise ApiError(_refusal(field), param=name, code="unsupported_parameter")
    return honoured


def _same(value: Any, neutral: Any) -> bool:
    """Equal as JSON: a boolean is not a number."""
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)


def _refusal(field: RequestField) -> str:
    allowed = " or ".join(str(value) for value in field.neutral if value not in ([], {}, ""))
    only = f" Leave it out, or send {allowed}." if allowed else " Leave it out."
    return f"{field.name} is not supported.{only}"
