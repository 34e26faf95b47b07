"""Runs for tests of reports: a folder of artifacts, and what a page must keep to."""

from __future__ import annotations

from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

from wispprof.artifacts import save_profile, save_trace, write_document
from wispprof.artifacts.manifest import Manifest
from wispprof.artifacts.plan import save_plan
from wispprof.artifacts.profile import ServerProfile, make_profile
from wispprof.artifacts.rows import AcceptanceTrace, StepRow, TracePath
from wispprof.fitting import fit_estimator
from wispprof.planning import make_plan
from wispprof.reporting import ANSWER_KIND, BENCH_KIND, Answer, Bench, TextSpan
from wispprof.settings.planner_settings import PlanSettings
from wispprof.simulation.devices import DeviceProfile
from wispprof.types import BatchShape, ModelInfo, Sampling


def step_rows(seed: int = 0) -> list[StepRow]:
    noise = np.random.default_rng(seed)
    rows = []
    for items in (1, 2, 4, 8):
        for new in (1, 5):
            for cached in (64, 256, 512):
                shape = BatchShape.uniform(items, new, cached)
                middle = 3.0 + 0.2 * shape.new_tokens + 0.003 * shape.cached_tokens
                samples = middle * noise.lognormal(0, 0.02, 6)
                rows.append(StepRow(shape.key(), "verify", shape, tuple(samples.tolist()), order=len(rows)))
    return rows


def make_trace() -> AcceptanceTrace:
    noise = np.random.default_rng(1)
    paths = []
    for _ in range(6):
        accepted = np.minimum(noise.geometric(0.3, 40) - 1, 4).astype(np.int32)
        drafts = np.zeros((40, 4), np.int32)
        features = noise.random((40, 4, 4)).astype(np.float32)
        paths.append(TracePath((1, 2, 3), tuple(range(40)), drafts, features, accepted))
    return AcceptanceTrace("target", "draft", "hash", Sampling(), tuple(paths))


def bench(policy: str, goodput: float, attainment: float) -> Bench:
    load = {"devices": 8, "slo_tokens_per_s": [4.0, 8.0], "rtt_ms": 5.0, "device": ["d (4 ms)"]}
    figures = {
        "goodput_tokens_per_s": goodput,
        "attainment": attainment,
        "tokens_per_s": 100.0,
        "ttft_p50_ms": None,
    }
    return Bench(policy, load, figures, ((3.0, 4.0, 3.1), (6.0, 7.0, 6.4)))


def write_run(out: Path, goodput: float = 90.0, seed: int = 0) -> Path:
    """A folder with every common artifact; ``goodput`` is that of ``wisp``."""
    profile = make_profile(
        Manifest("server", ModelInfo("tiny", "float32", 1000), hardware={"cpu": "a <cpu>"}),
        step_rows(seed),
    )
    assert isinstance(profile, ServerProfile)
    save_profile(profile, out / "server")
    trace = make_trace()
    trace_hash = save_trace(trace, out / "trace.jsonl")
    estimator = fit_estimator(step_rows(seed), "wisp-linear")
    estimator.save(out / "estimator.json", {"profile": profile.hash})
    plan = make_plan(
        estimator,
        [DeviceProfile("laptop", draft_ms=4.0)],
        trace,
        PlanSettings(rtts_ms=(5.0, 50.0), slos=(4.0, 8.0), k_max=4, max_sessions=16),
        inputs={"trace": trace_hash},
    )
    save_plan(plan, out / "plan.json")
    for made in (bench("server-only", 50.0, 0.5), bench("wisp", goodput, 0.9)):
        write_document(out / f"bench-{made.policy}.json", BENCH_KIND, asdict(made))
    answer = Answer("def <f>:", (TextSpan(" a & b", "draft"), TextSpan("!", "target")), {})
    write_document(out / "answer.json", ANSWER_KIND, asdict(answer))
    return out


class Page(HTMLParser):
    """Collects ids and external references, and checks that tags close."""

    VOID = ("meta", "br", "hr", "img", "use", "path", "input", "link")

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.stack.append(tag)
        given = dict(attrs)
        if tag in ("script", "link", "iframe", "img"):
            self.loads.append(tag)
        for name in ("src", "href", "xlink:href"):
            value = given.get(name) or ""
            if value and not value.startswith("#"):
                self.loads.append(value)
        if given.get("id"):
            self.ids.append(str(given["id"]))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.stack.pop() == tag


def parsed(text: str) -> Page:
    page = Page()
    page.feed(text)
    return page
