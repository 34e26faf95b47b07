"""Comparing, merging, exporting, importing; link profiles over an in-process connection; commands."""

from __future__ import annotations

import asyncio
import csv
import itertools
import json
import math
import random
import statistics
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from wispprof.artifacts import EdgeRow, Manifest, StepRow, load_edge, load_profile, make_profile, save_profile
from wispprof.cli import app
from wispprof.errors import ArtifactDamaged, HandshakeRefused, ProfileError, ProtocolError
from wispprof.profiling.link_profiler import link_summary, profile_link
from wispprof.profiling.llama_bench import import_results
from wispprof.profiling.profile_tools import diff_profiles, export_rows, merge_profiles
from wispprof.settings.profiler_settings import LinkProfilerSettings, Output
from wispprof.types import BatchShape, ModelInfo

MODEL = ModelInfo("tiny", "float32", 1_000_000, kv_bytes_per_token=4096)
MACHINE = {"hash": "abc", "cpu": "Some CPU"}


def server_profile(seed=0, slow=(), count=24, first=0, **manifest):
    generator = random.Random(seed)
    rows = []
    for i in range(first, first + count):
        shape = BatchShape.uniform(1 + i % 4, 5, 64 * (1 + i))
        ms = 1 + 0.02 * shape.new_tokens + 0.004 * shape.cached_tokens
        ms *= 1.5 if shape.key() in slow else 1.0
        samples = tuple(ms * (1 + 0.02 * generator.random()) for _ in range(12))
        rows.append(StepRow(shape.key(), "verify", shape, samples, order=i))
    made = Manifest("server", MODEL, hardware=MACHINE, engine={"device": "cpu"}, **manifest)
    return make_profile(made, rows)


# --- diff, merge, export --------------------------------------------------------------------------


def test_two_runs_of_a_quiet_machine_do_not_differ():
    found = diff_profiles(server_profile(1), server_profile(2))
    assert len(found.rows) == 24
    assert found.changed_share <= 0.05
    assert found.same_machine
    assert found.same_model


def test_what_really_changed_is_named():
    slow = [row.key for row in server_profile().rows[3:6]]
    found = diff_profiles(server_profile(1), server_profile(2, slow))
    assert sorted(row.key for row in found.changed) == sorted(slow)
    assert all(row.ratio == pytest.approx(1.5, rel=0.05) for row in found.changed)
    edge = make_profile(Manifest("edge", MODEL), [EdgeRow("a", "draft_step", 1, (1.0,))])
    with pytest.raises(ProfileError, match="kind"):
        diff_profiles(server_profile(), edge)


def swept(seed, slow=(), pace=1.0, count=120, noise=0.01, block_noise=0.02):
    """Rows of a sweep: three blocks of three samples each, with reference measurements between."""
    generator = random.Random(seed)
    rows = []

    def block(ms):
        here = ms * pace * math.exp(generator.gauss(0, block_noise))
        return [here * math.exp(abs(generator.gauss(0, noise))) for _ in range(3)]

    for i in range(count):
        shape = BatchShape.uniform(1 + i % 4, 5, 64 * (1 + i))
        ms = (1 + 0.004 * shape.cached_tokens) * (1.15 if i in slow else 1.0)
        samples = tuple(itertools.chain(*(block(ms) for _ in range(3))))
        blocks = ((2 * i, 3), (2 * i + 400, 3), (2 * i + 800, 3))
        rows.append(StepRow(f"k{i}", "verify", shape, samples, order=2 * i, blocks=blocks))
        if i % 10 == 0:
            reference_sample = (*block(5.0), *block(5.0))
            rows.append(StepRow("s", "sentinel", shape, reference_sample, order=2 * i + 1))
    made = Manifest("server", MODEL, hardware=MACHINE, measure={"drift": 0.1})
    return make_profile(made, rows)


@pytest.mark.parametrize("pace", [1.0, 1.06, 0.95])
@pytest.mark.parametrize("block_noise", [0.005, 0.02, 0.05])
def test_two_sweeps_of_one_machine_hardly_differ_however_noisy_it_is(pace, block_noise):
    """Over 20 pairs, though single medians are 5 % apart often enough; the pace is divided out."""
    found = [
        diff_profiles(
            swept(seed, block_noise=block_noise),
            swept(seed + 100, pace=pace, block_noise=block_noise),
        )
        for seed in range(20)
    ]
    assert max(one.changed_share for one in found) <= 0.05
    assert statistics.fmean(one.changed_share for one in found) <= 0.005
    assert statistics.fmean(one.slowdown for one in found) == pytest.approx(pace, rel=0.02)
    if block_noise == 0.05:
        apart = [abs(row.ratio / one.slowdown - 1) > 0.05 for one in found for row in one.rows]
        assert statistics.fmean(apart) > 0.1  # what a plain threshold would have reported


def test_a_change_is_found_among_many_shapes_and_nothing_else_is():
    slow = {7, 30, 31, 88}
    for seed in range(10):
        found = diff_profiles(swept(seed), swept(seed + 50, slow))
        named = {int(row.key[1:]) for row in found.changed}
        assert len(named & slow) >= 3
        assert len(named - slow) <= 1


def test_a_machine_that_became_slower_as_a_whole_is_not_explained_away():
    one, other = swept(1), swept(2, pace=1.3)
    found = diff_profiles(one, other)
    assert found.slowdown == 1.0
    assert found.sentinel_ratio == pytest.approx(1.3, rel=0.03)
    assert found.changed_share == 1.0
    slightly = swept(3, pace=1.08, block_noise=0.002)
    assert diff_profiles(swept(1, block_noise=0.002), slightly).changed_share == 0
    assert diff_profiles(swept(1, block_noise=0.002), slightly, absolute=True).changed_share > 0.9


def test_false_findings_are_bounded_not_each_test():
    from wispprof.profiling.profile_tools import discoveries

    assert discoveries([0.01, 0.02, 0.03, 0.04, 0.05], 0.05) == [True] * 5
    assert discoveries([0.02, 0.5, 0.5, 0.5, 0.5], 0.05) == [False] * 5
    assert discoveries([0.5, 0.009, 0.02, 0.9, 0.2], 0.05) == [False, True, True, False, False]
    assert discoveries([]) == []


def test_merged_sweeps_follow_each_other_in_the_order_of_measurement():
    """Otherwise blocks of two sweeps would appear to be measured at the same time."""

    def reference_sample(order, key="s"):
        return StepRow(key, "sentinel", BatchShape.uniform(4, 5, 64), (1.0,) * 3, order=order)

    def row(key, order):
        blocks = ((order, 1), (order + 4, 2))
        shape = BatchShape.uniform(1, 1, order + 1)
        return StepRow(key, "verify", shape, (1.0,) * 3, order=order, blocks=blocks)

    manifest = server_profile(1).manifest
    late = replace(row("b", 3), set_aside_ms=(2.0,), set_aside_blocks=((9, 1),))
    one = make_profile(manifest, [reference_sample(0), row("a", 1), reference_sample(6)])
    two = make_profile(manifest, [reference_sample(0), late, reference_sample(10)])
    merged = merge_profiles([one, two])
    assert [r.order for r in merged.rows] == [0, 1, 6, 7, 10, 17]
    moved = next(r for r in merged.rows if r.key == "b")
    assert (moved.blocks, moved.set_aside_blocks) == (((10, 1), (14, 2)), ((16, 1),))
    strangers = make_profile(manifest, [reference_sample(0, "other"), late, reference_sample(10, "other")])
    assert not any(r.kind == "sentinel" for r in merge_profiles([one, strangers]).rows)


def test_merging_keeps_the_cleaner_row():
    one, two = server_profile(1, count=6), server_profile(2, count=6, first=3)
    dirty = make_profile(one.manifest, [replace(row, flags=("drift",)) for row in one.rows])
    merged = merge_profiles([dirty, two])
    assert len(merged.rows) == 9
    by_key = {row.key: row for row in merged.rows}
    assert all(not by_key[row.key].flags for row in two.rows)
    assert merged.manifest.rows == 9
    for other in (
        make_profile(replace(two.manifest, model=ModelInfo("other")), two.rows),
        make_profile(replace(two.manifest, hardware={"hash": "x"}), two.rows),
        make_profile(replace(two.manifest, engine={"device": "cuda"}), two.rows),
    ):
        with pytest.raises(ProfileError, match="different"):
            merge_profiles([one, other])
    with pytest.raises(ProfileError, match="two"):
        merge_profiles([one])
    busier = replace(two.manifest, engine={**two.manifest.engine, "threads": 7})
    with pytest.raises(ProfileError, match=r"of different engines: threads \w+ and threads 7\."):
        merge_profiles([one, make_profile(busier, two.rows)])


def test_export(tmp_path):
    assert export_rows(server_profile(), tmp_path / "x.csv") == 24
    with (tmp_path / "x.csv").open() as file:
        table = list(csv.DictReader(file))
    assert table[0]["new_tokens"] == "5"
    assert float(table[0]["low_ms"]) <= float(table[0]["median_ms"]) <= float(table[0]["high_ms"])
    with pytest.raises(ProfileError, match=r"\.csv or \.parquet"):
        export_rows(server_profile(), tmp_path / "x.doc")


# --- llama-bench ----------------------------------------------------------------------------------

BENCH = {
    "build_commit": "abc123",
    "cpu_info": "Cortex-A76",
    "gpu_info": "",
    "model_filename": "/models/llama-1b-q4.gguf",
    "model_type": "llama 1B Q4_0",
    "model_n_params": 1235814432,
    "n_threads": 4,
    "n_prompt": 0,
    "n_gen": 128,
    "n_depth": 0,
    "test_time": "2026-01-01T00:00:00Z",
    "avg_ts": 14.0,
    "samples_ts": [14.0, 14.5, 13.5],
}


def test_llama_bench_results_become_an_edge_profile(tmp_path):
    tests = [
        BENCH,
        {**BENCH, "n_depth": 512, "avg_ts": 10.0, "samples_ts": [10.0]},
        {**BENCH, "n_prompt": 512, "n_gen": 0, "avg_ts": 100.0, "samples_ts": [100.0]},
        {**BENCH, "n_prompt": 64, "n_gen": 64},
    ]
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(tests))
    profile = import_results(file, Output(tmp_path / "e"))
    assert load_edge(tmp_path / "e") == profile
    assert profile.draft_ms(64) == pytest.approx(1000 / 14.0)
    assert profile.draft_ms(576) == pytest.approx(100.0)
    [prefill] = profile.of_kind("prefill")
    assert (prefill.tokens, prefill.median_ms) == (512, pytest.approx(5120.0))
    assert {row.source for row in profile.rows} == {"imported"}
    assert profile.manifest.model.id == "llama-1b-q4.gguf"
    for bad, says in (
        ("3", "list"),
        ("{}", "test 1.*n_prompt"),
        (json.dumps(BENCH) + "\n{", "JSON"),
        ("[", "JSON"),
        (json.dumps([{**BENCH, "n_gen": "x"}]), "test 1"),
        (json.dumps([{**BENCH, "samples_ts": [14.0, 1e308]}]), r"1e\+308 tokens/s"),
        (json.dumps([{**BENCH, "samples_ts": [14.0, 1e-320]}]), "tokens/s"),
    ):
        file.write_text(bad)
        with pytest.raises(ArtifactDamaged, match=says):
            import_results(file, Output())
    for bad, says in (
        (json.dumps([tests[2]]), "no generation"),
        (json.dumps([BENCH, {**BENCH, "model_filename": "other"}]), "several models"),
    ):
        file.write_text(bad)
        with pytest.raises(ProfileError, match=says):
            import_results(file, Output())


def test_llama_bench_matrices_and_lines(tmp_path):
    """Tests of one setting make a profile; of several, one is chosen and none overwrites another."""
    four, eight = BENCH, {**BENCH, "n_threads": 8, "avg_ts": 20.0, "samples_ts": [20.0], "flash_attn": True}
    file = tmp_path / "bench.jsonl"
    file.write_text("".join(json.dumps(test) + "\n" for test in (four, eight, four)))
    with pytest.raises(ProfileError, match=r"n_threads 4, 8; .*--where n_threads=4"):
        import_results(file, Output())
    with pytest.raises(ProfileError, match="no test with n_threads=3"):
        import_results(file, Output(), {"n_threads": 3})
    chosen = import_results(file, Output(), {"n_threads": 8, "flash_attn": True})
    assert chosen.draft_ms(64) == pytest.approx(50.0)
    [row] = import_results(file, Output(), {"n_threads": 4}).rows
    assert len(row.samples_ms) == 6
    done = run("profile", "import-llama-bench", file, "--where", "n_threads=8", "--out", tmp_path / "e")
    assert done.exit_code == 0, done.stderr
    assert load_edge(tmp_path / "e").manifest.engine["n_threads"] == 8


# --- link -----------------------------------------------------------------------------------------


class FakeLink:
    """A server at the end of a line with a known delay and bandwidth; time is counted."""

    def __init__(self, rtt_ms=20.0, bytes_per_ms=100.0, wrong=None):
        self.now, self.rtt_ms, self.rate, self.wrong = 0.0, rtt_ms, bytes_per_ms, wrong
        self.answers, self.closed = [], False

    def clock(self):
        return self.now

    async def send(self, data):
        from wispprof import protocol

        frame = protocol.decode_edge(data)
        if isinstance(frame, protocol.Hello):
            if self.wrong == "key":
                self.answers.append(protocol.Problem(-1, "key", "unknown key"))
            else:
                self.answers.append(protocol.Welcome(1, "tiny", "tok", 256, 8, True))
            return
        self.now += (self.rtt_ms + (len(frame.payload) + frame.reply_bytes) / self.rate) / 1000
        size = 3 if self.wrong == "size" else frame.reply_bytes
        self.answers.append(protocol.Pong(frame.number, bytes(size)))

    async def receive(self):
        from wispprof import protocol

        if not self.answers:
            await asyncio.sleep(3600)
        return protocol.encode(self.answers.pop(0))

    async def close(self):
        self.closed = True


def measure(link, **more):
    async def connect():
        return link

    return profile_link(LinkProfilerSettings("ws://x", count=8, **more), connect=connect, clock=link.clock)


def test_a_link_profile_finds_delay_and_bandwidth(tmp_path):
    link = FakeLink()
    profile = measure(link, output=Output(tmp_path / "l"))
    assert load_profile(tmp_path / "l") == profile
    assert link.closed
    summary = profile.manifest.summary
    assert summary["expected_s"] is None  # nothing was announced
    assert summary["rtt_ms"] == pytest.approx(20.0)
    assert summary["jitter_ms"] == pytest.approx(0.0, abs=1e-3)
    assert summary["uplink_mbit_per_s"] == pytest.approx(0.8, rel=0.01)
    assert summary["downlink_mbit_per_s"] == pytest.approx(0.8, rel=0.01)
    assert all(len(row.samples_ms) == 8 for row in profile.rows)


def test_a_link_too_fast_to_tell_claims_no_bandwidth():
    assert "uplink_mbit_per_s" not in link_summary(measure(FakeLink(bytes_per_ms=1e9)).rows)


def test_servers_that_refuse_or_lie():
    with pytest.raises(HandshakeRefused, match="unknown key"):
        measure(FakeLink(wrong="key"))
    with pytest.raises(ProtocolError, match="bytes"):
        measure(FakeLink(wrong="size"))


# --- commands -------------------------------------------------------------------------------------


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_profile_commands(tmp_path):
    save_profile(server_profile(1), tmp_path / "a")
    save_profile(server_profile(2), tmp_path / "b")
    assert "1x(5@64)" in run("profile", "show", tmp_path / "a").stdout
    shown = json.loads(run("profile", "show", tmp_path / "a", "--json").stdout)
    assert len(shown["rows"]) == shown["manifest"]["rows"] == 24
    compared = json.loads(run("profile", "diff", tmp_path / "a", tmp_path / "b", "--json").stdout)
    assert compared["compared"] == 24
    assert run("profile", "merge", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "c").exit_code == 0
    assert run("profile", "merge", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "c").exit_code == 1
    assert run("profile", "export", tmp_path / "c", tmp_path / "c.csv").exit_code == 0
    assert run("profile", "validate", tmp_path / "a", tmp_path / "c").exit_code == 0
    rows = tmp_path / "a.jsonl"
    rows.write_bytes(rows.read_bytes()[:-9])
    torn = run("profile", "validate", tmp_path / "a", tmp_path / "b", "--json")
    assert torn.exit_code == 1
    verdicts = json.loads(torn.stdout)
    assert "line 24: the line is torn" in verdicts[str(tmp_path / "a")]
    assert verdicts[str(tmp_path / "b")] == "good"
    assert run("profile", "show", tmp_path / "nothing").exit_code == 1


def test_ctrl_c_says_where_the_rows_are(tmp_path, monkeypatch):
    from wispprof.profiling import server_profiler
    from wispprof.profiling.profile_run import journal_path

    def interrupted(settings, progress, **_):
        journal_path(settings.output.path).write_bytes(b"header\nrow\nrow\n")
        progress(2, 9, "ETA 0:05")
        raise KeyboardInterrupt

    monkeypatch.setattr(server_profiler, "profile_server", interrupted)
    stopped = run("profile-server", "--out", tmp_path / "p")
    assert stopped.exit_code == 130
    assert "2 finished blocks" in " ".join(stopped.stderr.split())
    assert "--resume" in stopped.stderr


def test_options_reach_the_settings(tmp_path, monkeypatch):
    from wispprof.profiling import server_profiler

    seen = []

    def measured(settings, progress, **_):
        seen.append(settings)
        return server_profile()

    monkeypatch.setattr(server_profiler, "profile_server", measured)
    done = run(
        "profile-server", "--items", "1-8*2", "--new", "1,5", "--target", "0.1", "--seed", "3",
        "--budget-minutes", "2", "--out", tmp_path / "p", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert json.loads(done.stdout)["manifest"]["kind"] == "server"
    [settings] = seen
    assert settings.axes.items == (1, 2, 4, 8)
    assert (settings.precision.target, settings.precision.seed) == (0.1, 3)
    assert settings.budget_s == 120
    assert run("profile-server", "--items", "8-1", "--out", tmp_path / "q").exit_code == 1
