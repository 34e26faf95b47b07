"""Write docs/api.md from the table of request fields: ``python docs/generate_api.py``.

A test compares the page with the output of this script.
"""

from __future__ import annotations

import json
from pathlib import Path

from wispprof.openai_api.choice_stream import AT_ONCE
from wispprof.openai_api.request_body import MAX_CHOICES
from wispprof.openai_api.request_fields import FIELDS, RequestField
from wispprof.openai_api.routes import StreamTiming

PAGE = Path(__file__).with_name("api.md")

HEAD = """# The OpenAI API

Made by `python docs/generate_api.py` from the table in `wispprof/openai_api/request_fields.py`.

`wispprof serve` and `wispprof edge` answer `/v1/chat/completions`, `/v1/completions` and `/v1/models`
with the same code. The same body gets the same text, finish reason and token counts from both: model
name, stop tokens, chat template and sampling defaults are the target's, which the server tells its
edges. `python benchmarks/two_endpoints.py` compares a hundred requests.

## Rules

- **Fields.** A field is honoured, refused with 400, or ignored. Only fields that cannot change the text
  are ignored. A field that is in no table is refused. `null` means that the field is left out. A refused
  field is accepted with a value that changes nothing.
- **Errors** have OpenAI's form: `{"error": {"message", "type", "param", "code"}}`. `param` names the
  field.
- **Defaults.** Temperature, `top_k`, `top_p` and `min_p` default to the target's
  `generation_config.json`, as in vLLM (`wispprof serve --generation-config`).
- **Seeds.** Choice `i` of a prompt samples with `seed + i`. A prompt in a list gets the text that it
  gets alone.
- **Stop strings** match text and the text of special tokens. The first complete one ends the answer; of
  several complete at the same character, the one listed first.
- **Counts.** `completion_tokens` counts up to and with the token that completes the stop string, or the
  stop token, as vLLM does. It does not depend on draft lengths.
  `usage.prompt_tokens_details.cached_tokens` is known to the server only.
- **Characters.** An answer that is cut within a character ends before it.
- **Log-probabilities** are the target's, of the raw logits: no temperature, no filters. There is one
  entry per completion token, for accepted drafts too. Prompts have none.
- **`stop_reason`** beside `finish_reason` is the stop string, or the stop token if the request named it.
"""

STREAMS = """## Streams

An error that is known within {headers_s:g} s, such as a refused admission, sets the HTTP status. Then
the headers leave, and a later error is the stream's last event. While there is no token, an SSE comment
(`: no token yet`) is sent every {heartbeat_s:g} s, which proxies count as activity and clients skip.

A request makes at most {choices} choices (`n` times prompts). {at_once} of them are generated at a time,
so a list of prompts never takes the whole server.

## Statistics

A response holds, beside OpenAI's fields, `metrics` in the form of vLLM's per-request metrics:
`time_to_first_token_ms`, `generation_time_ms`, `mean_itl_ms`, `tokens_per_second`, and from an edge
`speculative_decoding` (`mean_acceptance_length`, `draft_acceptance_rate`, `acceptance_histogram`,
`num_spec_steps`, `num_accepted_draft_tokens`, `num_draft_tokens`, `num_spec_tokens`). An edge adds
`wispprof`, the [statistics of the request](metrics.md#statistics-of-an-answer).
In a stream both come with the last chunk of a choice. With
several choices each choice has its own.

An edge's `/metrics` has the counters `vllm:spec_decode_num_drafts`, `…_num_draft_tokens`,
`…_num_accepted_tokens` and `…_num_accepted_tokens_per_pos` too, which `vllm bench serve` reads.
"""


def render() -> str:
    """The page as Markdown."""
    timing = StreamTiming()
    streams = STREAMS.format(
        headers_s=timing.headers_s,
        heartbeat_s=timing.heartbeat_s,
        choices=MAX_CHOICES,
        at_once=AT_ONCE,
    )
    parts = [HEAD, streams, "## Honoured\n", _table("honoured"), "## Refused\n", _table("refused")]
    return "\n".join([*parts, "## Ignored\n", _table("ignored")])


def _table(use: str) -> str:
    last = "Accepted values" if use == "refused" else "Note"
    rows = [f"| Field | Route | {last} |", "|---|---|---|"]
    rows += [_row(field) for field in FIELDS if field.use == use]
    return "\n".join(rows) + "\n"


def _row(field: RequestField) -> str:
    values = ", ".join(f"`{json.dumps(value)}`" for value in field.neutral)
    routes = "both" if len(field.endpoints) == 2 else field.endpoints[0]
    note = " · ".join(part for part in (values, field.note) if part)
    return f"| `{field.name}` | {routes} | {note} |"


if __name__ == "__main__":
    PAGE.write_text(render())
