"""Bookkeeping of a session on either side, pure: no clock, no I/O, no torch.

``ledger`` is the server's view (committed tokens, draft tail, deadline), ``account`` what it says of itself,
``path`` the edge's view (frontier, drafts beyond it, epoch). Runtime and simulator run the same objects, so
that a merge, a rollback or a proactive hit means the same in both.
"""
