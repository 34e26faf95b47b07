"""What a step may hold."""

from __future__ import annotations

from wispprof.artifacts.plan import BatchRow, Plan
from wispprof.policies import Limits
from wispprof.server.session_manager import SessionManager
from wispprof.settings.server_settings import ServerSettings


class StepLimits:
    """What a step may hold: the settings, tightened by the plan's row for the fastest SLO class that
    is open, the load level, and the sessions' mean context (a step's KV reads follow the mean)."""

    def __init__(self, settings: ServerSettings, plan: Plan | None, manager: SessionManager) -> None:
        self._plan = plan
        self._settings = settings
        self._manager = manager
        self._rows: dict[tuple[float, int, int], BatchRow] = {}

    @property
    def row(self) -> BatchRow | None:
        """The plan's row in force; ``None`` without a plan."""
        if self._plan is None:
            return None
        states = [one.state for one in self._manager.sessions]
        speed = max((state.slo.tokens_per_s for state in states), default=1.0)
        mean = sum(state.committed_len for state in states) // len(states) if states else None
        key = (speed, self._manager.load_level, self._plan.nearest_context(mean))
        if key not in self._rows:
            self._rows[key] = self._plan.batch_row(*key)
        return self._rows[key]

    def get(self, kv_free: int) -> tuple[Limits, BatchRow | None]:
        """The limits of a step that starts now, and the plan's row they follow."""
        settings, row = self._settings, self.row
        items, tokens, chunk = settings.max_items, settings.max_tokens, settings.prefill_chunk
        if row is not None:
            items = max(1, min(items, row.max_items))
            tokens = max(1, min(tokens, row.token_budget))
            chunk = max(1, min(chunk, row.prefill_chunk))
        return Limits(items, tokens, chunk, kv_free), row
