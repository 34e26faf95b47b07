"""State machines of a session, pure: ``SessionState`` on the server, ``EdgeSession`` on the edge.

Runtime and simulator drive the same objects, so a merge, a rollback or a proactive hit means the same in
both.
"""
