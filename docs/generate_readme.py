"""Write the README's results table and picture from a run of the demo.

    python docs/generate_readme.py out/demo     # read the run in out/demo, record it in docs/demo.json
    python docs/generate_readme.py              # use docs/demo.json

``make readme`` runs the demo first. A test compares README and picture with ``docs/demo.json``.
"""

from __future__ import annotations

import json
import re
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RECORD, PICTURE, README = HERE / "demo.json", HERE / "demo.svg", HERE.parent / "README.md"

# Heading, figure of the record, how it is shown.
COLUMNS = (
    ("goodput, tok/s", "goodput_tokens_per_s", "{:.0f}"),
    ("SLO attainment", "attainment", "{:.0%}"),
    ("all tok/s", "tokens_per_s", "{:.0f}"),
    ("TTFT p50, ms", "ttft_p50_ms", "{:.0f}"),
    ("TPOT p50, ms", "tpot_p50_ms", "{:.1f}"),
    ("accepted per round", "accepted_per_round", "{:.2f}"),
)


def record_of(folder: Path) -> dict[str, Any]:
    """The figures of the run in ``folder`` that the README shows."""
    from wispprof.hardware.machine_info import cores_text
    from wispprof.reporting import Bench, load_run, verdict

    run = load_run(folder)
    benches = [Bench.of(document) for document in run.benches]
    if run.server is None or not benches:
        raise SystemExit(f"error: {folder} is not the folder of a complete demo. Run `wispprof demo`.")
    hardware = run.server.manifest.hardware
    return {
        "machine": f"{cores_text(hardware['cores'])} of {hardware['cpu'] or hardware['arch']}",
        "made": run.benches[-1].provenance.created[:10],
        "seconds": _seconds(run.server.manifest.started, run.benches[-1].provenance.created),
        "verdict": verdict(benches),
        "turns": int(benches[0].figure("turns") or 1),
        "load": benches[0].load,
        "systems": {bench.policy: {name: bench.figure(name) for _, name, _ in COLUMNS} for bench in benches},
    }


def _seconds(begin: str, end: str) -> float:
    return (datetime.fromisoformat(end) - datetime.fromisoformat(begin)).total_seconds()


def parts(record: dict[str, Any]) -> dict[str, str]:
    """The generated parts of the README, by name."""
    load = record["load"]
    classes = ", ".join(f"{speed:.0f}" for speed in load["slo_tokens_per_s"])
    head = " | ".join(heading for heading, _, _ in COLUMNS)
    rows = [
        f"| `{policy}` | " + " | ".join(_cell(figures[name], form) for _, name, form in COLUMNS)
        for policy, figures in record["systems"].items()
    ]
    alt = "; ".join(
        f"{policy} {figures['goodput_tokens_per_s']:.0f} tokens/s, "
        f"{100 * figures['attainment']:.0f} % SLO attainment"
        for policy, figures in record["systems"].items()
    )
    return {
        "picture": f"![Goodput and SLO attainment by serving policy: {alt}](docs/demo.svg)",
        "table": "\n".join(
            [
                f"Measured on {record['machine']} in {record['seconds']:.0f} s ({record['made']}): "
                f"{load['devices']} replayed",
                f"devices over a {load['rtt_ms']:g} ms link, with SLOs of {classes} tokens/s in turn.",
                *(
                    [f"The policies took {record['turns']} turns each over the same requests."]
                    if record["turns"] > 1
                    else []
                ),
                "",
                f"| policy | {head} |",
                "|" + "---|" * (len(COLUMNS) + 1),
                *(f"{row} |" for row in rows),
                "",
                f"> {record['verdict']}.",
            ]
        ),
    }


def _cell(value: float | None, form: str) -> str:
    return "–" if not value else form.format(value).replace("%", " %")


def render(text: str, record: dict[str, Any]) -> str:
    """README ``text`` with its generated parts as ``record`` says."""
    for name, content in parts(record).items():
        begin, end = f"<!-- {name}: make readme -->", f"<!-- /{name} -->"
        pattern = re.escape(begin) + r".*?" + re.escape(end)
        text, found = re.subn(pattern, lambda _: f"{begin}\n{content}\n{end}", text, flags=re.S)  # noqa: B023
        if found != 1:
            raise SystemExit(f"error: README.md has no part {name!r}.")
    return text


def picture(record: dict[str, Any]) -> str:
    """Goodput within all tokens/s, and SLO attainment, by policy, as an SVG file."""
    from wispprof.reporting import Bench
    from wispprof.reporting.figures import policy_bars
    from wispprof.reporting.theme import standalone

    benches = [Bench(policy, {}, figures) for policy, figures in record["systems"].items()]
    return standalone(policy_bars(benches)) + "\n"


def main(words: list[str]) -> None:
    if words:
        RECORD.write_text(json.dumps(record_of(Path(words[0])), indent=2) + "\n", encoding="utf-8")
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    README.write_text(render(README.read_text(encoding="utf-8"), record), encoding="utf-8")
    PICTURE.write_text(picture(record), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
