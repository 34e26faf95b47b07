"""What a step may hold now: by the plan's row where there is a plan, by the settings where not."""

from __future__ import annotations

from wispprof.artifacts.plan import BatchRow, Plan
from wispprof.policies import Limits
from wispprof.server.session_manager import SessionManager
from wispprof.settings.server_settings import ServerSettings

__all__ = ["StepLimits"]


class StepLimits:
    """The plan's batching table, its row chosen by the fastest SLO class that is live and the load level.

    The settings stay the most that a row may allow: they say what this server's operator wants of it.
    """

    def __init__(
        self, settings: ServerSettings, plan: Plan | None, manager: SessionManager
    ) -> None:
        self.plan = plan
        self._settings = settings
        self._manager = manager
        self._rows: dict[tuple[float, int], BatchRow] = {}

    @property
    def row(self) -> BatchRow | None:
        """The plan's row that is obeyed now; ``None`` without a plan."""
        if self.plan is None:
            return None
        speed = max((live.state.slo.tokens_per_s for live in self._manager.sessions), default=1.0)
        key = (speed, self._manager.load_level)
        if key not in self._rows:
            self._rows[key] = self.plan.batch_row(*key)
        return self._rows[key]

    def at(self, kv_free: int) -> tuple[Limits, BatchRow | None]:
        """The limits of a step that starts now with so many cache tokens free, and the row they are from."""
        settings, row = self._settings, self.row
        items, tokens, chunk = settings.max_items, settings.max_tokens, settings.prefill_chunk
        if row is not None:
            items = max(1, min(items, row.max_items))
            tokens = max(1, min(tokens, row.token_budget))
            chunk = max(1, min(chunk, row.prefill_chunk))
        return Limits(items, tokens, chunk, kv_free), row
