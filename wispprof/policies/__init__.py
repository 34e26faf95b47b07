"""Pure decisions, shared by runtime and simulator."""
