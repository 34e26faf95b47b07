"""The answer for a fleet in sentences."""

from __future__ import annotations

from wispprof.artifacts.fleet_answer import FleetAnswer, FleetOption

LIMITS = {
    "kv": "KV memory",
    "ttft": "first token",
    "speed": "token speed",
    "one": "one server is enough",
    "dear": "needs more, too dear",
    "never": "no number of servers",
}
"""What limits an option, by :attr:`~wispprof.artifacts.fleet_answer.FleetOption.bound_by`."""

_SPOKEN = {"server-only": "no drafts", "server-spec": "speculation on the server"}
"""Systems whose names say little to a reader from outside."""


def headline(answer: FleetAnswer) -> str:
    """What to buy."""
    best = answer.best
    if best is None:
        return f"No candidate meets the SLO for {answer.target:.0%} of the sessions"
    system = _SPOKEN.get(best.system, best.system)
    return f"Buy {_servers(best)} and serve with {system}: ${best.dollars_per_h:,.2f} an hour"


def _servers(option: FleetOption) -> str:
    return f"{_count(option.bought)} ({option.server})"


def _count(servers: int) -> str:
    return f"{servers} server{'s'[: servers != 1]}"


def in_words(answer: FleetAnswer) -> list[str]:
    """The answer, its runner-up, and the best without drafts."""
    best = answer.best
    lines = [f"{headline(answer)}."]
    if best is None:
        return lines
    enough = "is enough" if best.servers == 1 else "are enough"
    lines.append(
        f"{answer.devices:,} devices send {answer.requests_per_s:.1f} requests/s in the busiest hour. "
        f"{_count(best.servers)} {enough}, {answer.spare} more may fail. "
        f"Limit: {LIMITS[best.bound_by]}; tightest class: {best.tightest}."
    )
    holding = [o for o in answer.options if o.servers and o.bound_by != "dear"]
    if len(holding) > 1:
        other = holding[1]
        more = other.dollars_per_h / best.dollars_per_h - 1
        lines.append(
            f"Runner-up: {_servers(other)} with {_SPOKEN.get(other.system, other.system)}, "
            f"${other.dollars_per_h:,.2f} an hour ({more:+.0%})."
        )
    alone = next((o for o in holding if o.system == "server-only"), None)
    if alone is not None and alone is not best:
        lines.append(_against(best, alone))
    return lines


def _against(best: FleetOption, alone: FleetOption) -> str:
    saved = 1 - best.dollars_per_h / alone.dollars_per_h
    return (
        f"Without any drafts: {_servers(alone)}, ${alone.dollars_per_h:,.2f} an hour; "
        f"{_SPOKEN.get(best.system, best.system)} saves {saved:.0%}."
    )
