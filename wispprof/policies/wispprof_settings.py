"""Switches and constants of the ``wispprof`` batching policy.

Source: *measured* on real engines or simulated fleets (tables in docs/decisions: slo-boost.md,
waiting-and-prompts.md, unreachable-slos.md), or *derived* from the model in the module that uses it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WispprofSettings:
    """Switches turn off one part of the policy each; constants tune the parts. "Steps" are step times."""

    cut_drafts: bool = True
    """Verify as many drafts of each session as maximise tokens per ms, instead of all."""
    wait_for_drafts: bool = True
    """Leave a session out of a step if its next draft is due and waiting saves time."""
    weigh_lag: bool = True
    """Give tokens of sessions that lag behind their SLO more weight."""
    slo_boost: bool = True
    """Shorten steps for sessions that would otherwise miss an SLO that undrafted steps meet."""
    size_prefill: bool = True
    """Size prompt chunks by the SLOs of the running sessions, instead of always taking a full chunk."""
    deprioritize: bool = True
    """Let sessions whose SLO is unreachable give way to the others."""
    undrafted_candidate: bool = True
    """Always consider the undrafted step, so that a step is never worse than server-only serving."""

    lag_weight: float = 4.0
    """Weight of a token of a session that lags far; others weigh 1. Measured: 8 changes nothing."""
    slo_boost_weight: float = 5.0
    """Combined weight of boosted sessions over that of all others. Measured: 2.5 meets fewer SLOs."""
    slo_unreachable_weight: float = 1.0
    """Weight of a token of a session whose SLO is unreachable. Measured: 0.25 costs 8 to 10 % of goodput."""
    starvation_steps: float = 8.0
    """A session left out for so many steps is scheduled whatever its value. Chosen; not tuned."""
    ttft_target: float = 4.0
    """Target TTFT of a prompt without one, over its prefill time alone. Measured: median TTFT 9.4 → 4.2 s."""

    lag_steps: float = 2.0
    """Lag is 0 with so many steps of slack and 1 when as many steps late. Derived: symmetric about on
    time."""
    boost_error: float = 0.15
    """Error allowed for in the time that undrafted steps need, and in a session's speed so far. Chosen: what
    real runs differ by. Measured for the speed: 0.1 and 0.2 change goodput by up to 2 %."""
    boost_speed_tokens: float = 8.0
    """Undrafted tokens that count as part of a session's speed so far. Measured: 4 and 16 change goodput by
    up to 2 %."""
    boost_full_steps: float = 1.0
    """Boost in full if the deadline is this many steps away. Derived: the next step decides."""
    boost_none_steps: float = 3.0
    """No boost from this many steps on. Derived: later steps can still react. Not tuned."""
    boost_ahead_share: float = 0.15
    """No boost for a session ahead of its SLO by this share of its generation. Chosen; not tuned."""

    wait_fixed_share: float = 1.0
    """Shares of the fixed step time that a waiting session must save. Measured: 0 and 2 change goodput
    by −6 to +4 %."""
    wait_max_acceptance: float = 0.995
    """Largest acceptance probability assumed of a due draft. Derived: it only bounds the candidates."""
    wait_iterations: int = 8
    """Iterations between token rate and waiting sessions. Derived: they stop as soon as nothing changes."""
    max_wait_ms: float = 50.0
    """Longest wait without a batch before the policy is asked again. Chosen; not tuned."""
    idle_value: float = 0.1
    """Tokens per session that an idle wait may cost. Chosen; not tuned."""

    min_chunk: int = 16
    """Prompt tokens that the first prompt gets in every step. Derived: nothing starves."""
    prefill_gap: float = 0.8
    """Share of the fastest session's time per step that prompts may use. Chosen: the rest absorbs
    variance."""
    prefill_growth: float = 2.0
    """A step may always grow so much for prompts. Measured: twofold alone costs 0.2 to 0.7 % of goodput."""
    prefill_growth_ahead: float = 3.0
    """The same if most sessions run far ahead of their SLO. Measured: 4 raises the worst gap from 96 to
    124 ms."""
    prefill_growth_queue: float = 4.0
    """The same if several prompts wait. Measured: 2.5 costs a fleet with long prompts 4 to 6 % of goodput."""
    prefill_ahead_share: float = 0.1
    """Share of its slack by which a session's gap may grow. Derived: ten such gaps use up the slack."""
    prefill_urgent: float = 2.0
    """A step may grow so much for a late first token. Derived: half of the step is prefill."""
    prefill_urgent_steps: float = 4.0
    """A first token is urgent if due within so many steps. Derived: twice ``prefill_urgent``."""

    max_cutoffs: int = 64
    """Rankings up to this length are priced at every cutoff, longer ones at half as many. Affects CPU
    time."""
    ewma_weight: float = 0.05
    """Weight of a new step in the averages of host overhead and prompt backlog. Derived: about 20 steps."""
