"""Bookkeeping of a session on either side, pure: no clock, no I/O, no torch.

``ledger`` is the server's view (committed tokens, draft tail, deadline), ``path`` the edge's (frontier,
drafts beyond it, epoch). Runtime and simulator run the same objects, so that a merge, a rollback or a
proactive hit means the same in both.
"""
