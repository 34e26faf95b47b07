"""Load and emulation: replay fleets against a running server, and servers that fit into a process."""
