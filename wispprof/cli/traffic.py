"""``wispprof traffic``: seen traffic as a workload file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wispprof.cli.console import note, output, result, table
from wispprof.cli.options import JsonFlag, OutputFile


def traffic(
    files: Annotated[
        list[Path],
        typer.Argument(
            help="Request logs of `serve`, traces of Azure, BurstGPT or Mooncake, or result files of vLLM, "
            "GuideLLM or aiperf."
        ),
    ],
    since: Annotated[
        Path | None, typer.Option(help="An earlier workload: print what has changed since.")
    ] = None,
    out: OutputFile = Path("workload.json"),
    as_json: JsonFlag = False,
) -> None:
    """Turn recorded requests into an anonymous workload file for `plan` and `fleet`."""
    from wispprof.artifacts.workload import load_workload, save_workload
    from wispprof.planning.traffic import changes, workload_of

    before = load_workload(since) if since is not None else None
    found = workload_of(files)
    save_workload(found, out)
    note(f"wrote {out}")
    rows = [
        ("requests", found.requests),
        ("hours", round(found.hours, 2)),
        ("requests/s, mean", round(found.mean_per_s, 3)),
        ("requests/s, busiest hour", round(found.busiest_per_s, 3)),
        ("burst (10 s, p99 over mean)", round(found.burst, 2)),
        ("reused share of prompts", round(found.reused, 3)),
        *(
            (f"{what}, p50 / p90 / p99", " / ".join(f"{found.quantile(what, q):,}" for q in (0.5, 0.9, 0.99)))
            for what in ("prompt", "output", "context")
        ),
        ("contexts to plan for", ", ".join(f"{c:,}" for c in found.contexts())),
    ]
    if found.slos:
        rows.append(("requests by SLO, tokens/s", ", ".join(f"{s}: {n:,}" for s, n in found.slos.items())))
    if found.rtts_ms:
        rows.append(("round trip, p10 / p50 / p90", " / ".join(f"{ms:.1f} ms" for ms in found.rtts_ms)))
    if found.cum_acceptance:
        shares = ", ".join(f"{share:.2f}" for share in found.cum_acceptance[:8])
        rows.append(("accepted with all before, by depth", shares))
    differing = changes(before, found) if before is not None else []
    shown = table(f"Traffic ({found.source})", "figure|value", rows, "Lengths in tokens, to within a bin.")
    document = {"workload": found, "contexts": found.contexts(), "changes": [c._asdict() for c in differing]}
    result(document, shown, as_json)
    if before is not None and not as_json:
        title = f"Changed since {since}" if differing else f"Nothing changed by more than 10 % since {since}"
        cells = ((c.figure, c.before, c.after, f"× {c.ratio:.2f}") for c in differing)
        output().print(table(title, "figure|before:.3g|now:.3g|ratio", cells))
