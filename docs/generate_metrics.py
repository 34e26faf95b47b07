"""Write docs/metrics.md from the metrics and the statistics themselves: ``python docs/generate_metrics.py``.

A test compares the page with what this makes.
"""

from __future__ import annotations

from pathlib import Path

from prometheus_client import CollectorRegistry

from wispprof.edge.request_stats import EdgeMetrics, RequestStats
from wispprof.server.metrics import Metrics

PAGE = Path(__file__).with_name("metrics.md")
HEAD = """# Metrics and statistics

Made by `python docs/generate_metrics.py` from the metrics themselves.

| where | what |
|---|---|
| server, `/metrics` | [metrics for Prometheus](#server); a [Grafana dashboard](grafana/wispprof.json) |
| edge, `/metrics` | [metrics for Prometheus](#edge) |
| edge, each answer | the object `wispprof`: [statistics of the request](#statistics-of-an-answer) |

Counters end in `_total` when they are read, histograms in `_bucket`, `_sum` and `_count`.

## Alerts

A rule file for Prometheus (`rule_files` in `prometheus.yml`):

```yaml
groups:
  - name: wispprof
    rules:
      - alert: WispprofDown
        expr: up{job="wispprof"} == 0
        for: 1m
        annotations: { summary: "The server does not answer (name its scrape job wispprof)" }
      - alert: WispprofSloAttainment
        expr: |
          sum(rate(wispprof:slo_attained_total[10m]))
            / (sum(rate(wispprof:slo_attained_total[10m])) + sum(rate(wispprof:slo_violations_total[10m])))
            < 0.95
        for: 5m
        annotations: { summary: "Fewer than 95 % of the sessions that ended in 10 minutes met their SLO" }
      - alert: WispprofRefusals
        expr: sum(rate(wispprof:requests_refused_total{code=~"slo|busy"}[5m])) > 0
        for: 5m
        annotations: { summary: "Requests are refused: their SLO cannot be met, or the server is full" }
      - alert: WispprofStepTimeDrift
        expr: wispprof:re_profile > 0
        for: 10m
        annotations: { summary: "Step times no longer match the profile" }
      - alert: WispprofFailedSteps
        expr: rate(wispprof:failed_steps_total[5m]) > 0
        annotations: { summary: "Engine steps fail" }
```

[serve.md](serve.md#notice-drift) says what to do about drift. Both counters of an SLO class exist from its
first session on, so the alert fires even if every session misses. With few sessions in ten minutes one miss
fires it: widen the window. Sessions without an SLO count neither as met nor as missed.

Sessions that the server refused do not count there; the simulator counts them as misses. To compare with a
simulation, count refusals too. An edge repeats a request that is refused as `busy`, and each time counts:

```promql
sum(rate(wispprof:slo_attained_total[10m]))
  / (sum(rate(wispprof:slo_attained_total[10m])) + sum(rate(wispprof:slo_violations_total[10m]))
     + (sum(rate(wispprof:requests_refused_total{code=~"slo|busy"}[10m])) or vector(0)))
  < 0.95
```
"""
DROP_REASONS = """
Values of `reason` in `wispprof:draft_tokens_dropped`, by the rules of
[wire.md](wire.md#drafts-never-change-the-text):

| reason | the draft tokens |
|---|---|
| `epoch` | were sent before the edge discarded its drafts; a commit had contradicted them, for example |
| `contradiction` | differ from committed text: the edge had not received the commit yet |
| `gap` | begin beyond the drafts that the server holds |
| `conflict` | differ from drafts of the same epoch that the server holds |
| `overflow` | exceed the drafts that the server holds for one session (`--max-drafts`) |
| `finished` | arrived after the last token of the session, before it was closed. Later ones are not counted |

Each other draft token (`spec_decode_num_draft_tokens`) becomes one of `spec_decode_num_accepted_tokens`,
`draft_tokens_matched` and `draft_tokens_wasted`. Those of `draft_tokens_cut` may be verified later. For one
device, give its edge a `--name`: `kinds` in `/dashboard` has these counts by name, also for ten minutes after
the last session of that name.
"""
UNDRAFTED_REASONS = """
Values of `reason` in `wispprof_edge_undrafted_requests`. `draft_note` of an answer says the same in words.

| reason | why no draft was accepted |
|---|---|
| `off` | drafting was off: by the request, or because the device has no draft model |
| `fault` | the draft model failed or exceeded `--draft-timeout-ms` |
| `vocabulary` | drafts were outside the target's vocabulary |
| `rejected` | the target rejected all drafts |
| `late` | commits overtook the drafts: the device, its prefill or the link is slow beside the server |
| `controller` | the controller or its plan chose k = 0: drafts would not pay |
| `no_proposal` | the drafter had nothing to propose, for example a lookup without a match |
"""
STATISTICS_HEAD = """
## Statistics of an answer

A round ends with a commit after the first token. Two figures have different denominators:
`accepted_per_round` divides by all rounds, those without drafts included.
`metrics.speculative_decoding.mean_acceptance_length` divides by the rounds that verified drafts, and counts
the target's own token too, as vLLM does.

Each drafted token has one fate: `drafted` = `accepted` + `matched` + `dropped` + `draft_only`.

| field | meaning |
|---|---|"""
STATISTICS = {
    "drafting": "whether this device drafts",
    "first_ms": "time to the first commit, from the request",
    "last_ms": "time to the last commit, from the request",
    "tokens": "committed tokens",
    "draft_only": "tokens of the draft model alone, which no server confirmed (`--fallback draft`)",
    "rounds": "commits after the first token",
    "drafted": "tokens drafted",
    "sent": "drafts sent to the server",
    "trees": "frames of drafts with branches",
    "plan_row": "row of the plan that was obeyed last: device/round trip/load level/SLO/mode/context",
    "verified_drafts": "drafts that the server verified",
    "accepted": "drafts verified and kept",
    "matched": "drafts that were right, but committed before they were verified",
    "draft_ms": "time spent drafting",
    "wasted_ms": "of it, on drafts after the first rejected one",
    "dropped": "drafts that ended in no committed token, the rejected ones included",
    "dropped_ms": "time spent on those",
    "proactive_guesses": "guesses at the target's own token, to draft on while a round is verified",
    "proactive_hits": "guesses that were right",
    "queue_ms": "time that rounds waited on the server for a step, in all",
    "verify_ms": "time of the steps that verified them, in all",
    "rtt_ms": "round trip of the link",
    "up_bytes": "bytes sent",
    "down_bytes": "bytes received",
    "reopened": "how often the session was opened again after a lost link",
    "late": "draft steps that a commit overtook",
    "foreign": "drafts outside the target's vocabulary, which are not sent",
    "no_proposal": "draft steps in which the drafter had nothing to propose",
    "declined": "rounds and bursts for which the controller or its plan chose k = 0",
    "prefill_ms": "the draft model's prefill; `null` until it ends",
    "catch_up": "committed tokens that the draft model read without drafting",
    "catch_up_ms": "time of that",
    "draft_fault": "why drafting stopped; empty if it did not",
    "finished": "why the answer ended",
    "energy_j": "the request's share of the device's energy; `null` without a sensor",
    "offered_by_position": "verified rounds with at least 1, 2, … drafts",
    "accepted_by_position": "rounds of these in which the first 1, 2, … drafts were accepted",
    "tokens_per_s": "committed tokens over the whole request",
    "ttft_ms": "time to the first token",
    "tpot_ms": "mean time per token after the first commit",
    "accepted_per_round": "`accepted` ÷ `rounds`",
    "queue_ms_per_round": "`queue_ms` ÷ `rounds`",
    "verify_ms_per_round": "`verify_ms` ÷ `rounds`",
    "energy_j_per_token": "`energy_j` ÷ tokens",
    "draft_note": "in words: why no draft was accepted, that k = 0 was chosen for most rounds, or what "
    "became of the drafts if most were not accepted",
}
"""Every key of :meth:`~wispprof.edge.request_stats.RequestStats.summary`, in its order."""


SAME_DRAFTS = """
The same drafts on both sides:

| of an answer | of the server |
|---|---|
| `sent` | `spec_decode_num_draft_tokens` and `draft_tokens_dropped`, and those that arrived too late |
| `verified_drafts` | `spec_decode_num_verified_tokens` |
| `accepted` | `spec_decode_num_accepted_tokens` |
| `matched` | `draft_tokens_matched`, and those that were not sent yet |
| `dropped` | `draft_tokens_wasted` and `draft_tokens_dropped`, and those that were not sent |
| `wasted_ms` | none: the device's own time |
"""


def render() -> str:
    """The page as Markdown."""
    assert list(STATISTICS) == list(RequestStats().summary())
    parts = [HEAD, "## Server\n", *_table(Metrics().registry), DROP_REASONS]
    parts += ["## Edge\n", *_table(EdgeMetrics().registry), UNDRAFTED_REASONS.rstrip()]
    parts += [STATISTICS_HEAD, *(f"| `{name}` | {text} |" for name, text in STATISTICS.items()), SAME_DRAFTS]
    return "\n".join(parts)


def _table(registry: CollectorRegistry) -> list[str]:
    rows = ["| metric | type | labels | meaning |", "|---|---|---|---|"]
    for collector in registry._collector_to_names:
        [described] = collector.describe()
        labels = ", ".join(f"`{label}`" for label in collector._labelnames)
        text = described.documentation.removesuffix(".")
        rows.append(f"| `{described.name}` | {described.type} | {labels} | {text} |")
    return rows


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
