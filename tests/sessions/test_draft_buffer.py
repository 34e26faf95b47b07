"""The edge's buffer: what it holds never contradicts what is committed, and its drafter can follow it."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wispprof.errors import ProtocolError
from wispprof.sessions.draft_buffer import CommitEffect, DraftBuffer

PROMPT = [7, 8, 9]


def buffer_with(drafts: list[int], **kwargs: object) -> DraftBuffer:
    buffer = DraftBuffer(PROMPT, **kwargs)  # type: ignore[arg-type]
    buffer.on_commit(4, [1], 0)
    for token in drafts:
        buffer.propose(token, 0.5, 2.0)
    return buffer


def test_full_accept_with_wrong_guess_costs_only_what_follows() -> None:
    buffer = buffer_with([2, 3])
    assert buffer.take() is not None
    for token in (50, 51, 52):  # proactive
        buffer.propose(token, 0.5, 2.0)
    effect = buffer.on_commit(7, [2, 3, 4], 2)
    assert effect.hits == 2
    assert effect.rejected
    assert effect.proactive
    assert not effect.proactive_hit
    assert (effect.rollback_to, effect.extend) == (6, (4,))
    assert (effect.wasted_tokens, effect.wasted_ms) == (2, 4.0)
    assert buffer.draft_ahead == 0
    assert buffer.epoch == 1


def test_proactive_hit_keeps_the_lead_and_the_epoch() -> None:
    buffer = buffer_with([2, 3])
    buffer.take()
    for token in (4, 5, 6):
        buffer.propose(token, 0.5, 2.0)
    effect = buffer.on_commit(7, [2, 3, 4], 2)
    assert effect.proactive_hit
    assert effect.rollback_to is None
    assert effect.extend == ()
    assert effect.kept == 2
    assert buffer.epoch == 0
    out = buffer.take()
    assert out is not None
    assert (out.base, out.tokens) == (7, (5, 6))


def test_partial_accept_rolls_back_to_the_first_rejected() -> None:
    buffer = buffer_with([2, 3, 9, 9])
    buffer.take()
    effect = buffer.on_commit(7, [2, 3, 4], 2)
    assert (effect.rollback_to, effect.extend, effect.wasted_tokens) == (6, (4,), 1)


def test_commit_beyond_the_drafts_extends() -> None:
    buffer = buffer_with([2])
    effect = buffer.on_commit(7, [2, 3, 4], 0)
    assert (effect.rollback_to, effect.extend, effect.hits, effect.rejected) == (
        None,
        (3, 4),
        1,
        False,
    )


def test_trimmed_round_keeps_its_rest_and_sends_it_again() -> None:
    buffer = buffer_with([2, 3, 4, 5])
    buffer.take()
    effect = buffer.on_commit(6, [2, 3], 1)  # one draft used, the own token equals the next
    assert effect.kept == 2
    out = buffer.take()
    assert out is not None
    assert (out.base, out.tokens) == (6, (4, 5))


def test_duplicates_and_late_commits_change_nothing() -> None:
    buffer = buffer_with([2, 3, 4])
    buffer.on_commit(6, [2, 3], 1)
    before = (buffer.committed, buffer.drafts, buffer.epoch)
    assert buffer.on_commit(6, [2, 3], 1) == CommitEffect()
    assert buffer.on_commit(5, [2], 0) == CommitEffect()
    assert (buffer.committed, buffer.drafts, buffer.epoch) == before
    overlapping = buffer.on_commit(7, [2, 3, 4], 2)
    assert overlapping.tokens == (4,)


def test_gaps_and_contradictions_are_errors() -> None:
    buffer = buffer_with([])
    with pytest.raises(ProtocolError, match="beyond the committed length"):
        buffer.on_commit(9, [1, 2], 0)
    with pytest.raises(ProtocolError, match="contradicts"):
        buffer.on_commit(5, [99, 2], 0)


def test_round_mode_has_one_round_outstanding() -> None:
    buffer = DraftBuffer(PROMPT)
    assert buffer.take() is None  # the prefill is outstanding
    buffer.on_commit(4, [1])
    empty = buffer.take()
    assert empty is not None
    assert empty.tokens == ()
    buffer.propose(2)
    assert buffer.take() is None
    buffer.on_commit(4, [1])  # a duplicate does not answer the round
    assert buffer.take() is None


def test_stream_mode_sends_each_draft_once() -> None:
    buffer = buffer_with([2, 3, 4], stream=True)
    first = buffer.take(2)
    assert first is not None
    assert (first.base, first.tokens) == (4, (2, 3))
    second = buffer.take()
    assert second is not None
    assert (second.base, second.tokens) == (6, (4,))
    assert buffer.take() is None
    buffer.reopened()
    again = buffer.take()
    assert again is not None
    assert again.tokens == (2, 3, 4)


def test_capacity_ends_at_the_draft_ahead_limit_and_before_the_last_token() -> None:
    buffer = DraftBuffer(PROMPT, draft_ahead_limit=2, end=5)
    buffer.propose(1)
    assert buffer.capacity_left == 0  # position 4 is the target's own
    buffer = DraftBuffer(PROMPT, draft_ahead_limit=1, end=50)
    buffer.propose(1)
    with pytest.raises(ValueError, match="No capacity"):
        buffer.propose(1)


class TinyServer:
    """The epoch rules of the protocol: random operations on pending drafts."""

    def __init__(self, prompt: list[int], truth: list[int]) -> None:
        self.truth = truth
        self.committed_len = len(prompt)
        self.pending_drafts: list[int] = []
        self.epoch = 0
        self.dead = -1

    def merge(self, epoch: int, base: int, tokens: tuple[int, ...]) -> None:
        if epoch <= self.dead or epoch < self.epoch:
            return
        if epoch > self.epoch:
            self.epoch, self.pending_drafts = epoch, []
        for position, token in enumerate(tokens, base):
            if position < self.committed_len:
                if self.truth[position] != token:
                    self.dead, self.pending_drafts = epoch, []
                    return
            elif position - self.committed_len < len(self.pending_drafts):
                if self.pending_drafts[position - self.committed_len] != token:
                    return
            elif position - self.committed_len == len(self.pending_drafts):
                self.pending_drafts.append(token)
            else:
                return

    def step(self, use: int) -> tuple[int, list[int], int]:
        used = self.pending_drafts[:use]
        accepted = 0
        while accepted < len(used) and used[accepted] == self.truth[self.committed_len + accepted]:
            accepted += 1
        new = self.truth[self.committed_len : self.committed_len + accepted + 1]
        if self.pending_drafts[: accepted + 1] == new[: len(self.pending_drafts[: accepted + 1])]:
            self.pending_drafts = self.pending_drafts[accepted + 1 :]
        else:
            self.dead, self.pending_drafts = self.epoch, []
        self.committed_len += len(new)
        return self.committed_len, new, accepted


class Mirror:
    """A drafter that only does what commit effects tell it."""

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = list(tokens)

    def follow(self, effect: CommitEffect) -> None:
        if effect.rollback_to is not None:
            assert effect.rollback_to <= len(self.tokens)
            del self.tokens[effect.rollback_to :]
        self.tokens.extend(effect.extend)


def interleave(buffer: DraftBuffer, seed: int, right: float, mirror: Mirror) -> tuple[list[int], int]:
    """Run a buffer against :class:`TinyServer` over links that delay, repeat and cut.

    Returns the number of drafts that were accepted, and of those that the server verified."""
    rng = random.Random(seed)
    truth = PROMPT + [rng.randrange(6) for _ in range(40)]
    server = TinyServer(PROMPT, truth)
    uplink: list[tuple[int, int, tuple[int, ...]]] = []
    downlink: list[tuple[int, list[int], int]] = []
    accepted = verified = 0
    ready = True
    while buffer.committed_len < len(truth) - 12:
        action = rng.random()
        if action < 0.4 and buffer.capacity_left:
            position = buffer.length
            token = truth[position] if rng.random() < right else rng.randrange(6)
            buffer.propose(token, 0.5, 1.0)
            mirror.tokens.append(token)
        elif action < 0.6:
            out = buffer.take(rng.choice([None, 1, 4]))
            if out is not None:
                uplink.append((out.epoch, out.base, out.tokens))
                if rng.random() < 0.1:
                    uplink.append(uplink[-1])
        elif action < 0.75 and uplink:
            server.merge(*uplink.pop(0))
            ready = True
        elif action < 0.85 and (buffer.stream or ready) and server.committed_len < len(truth) - 10:
            use = rng.randrange(9)
            verified += min(use, len(server.pending_drafts))
            downlink.append(server.step(use))
            ready = False
            if rng.random() < 0.1:
                downlink.append(downlink[-1])
        elif action < 0.98 and downlink:
            effect = buffer.on_commit(*downlink.pop(0))
            mirror.follow(effect)
            accepted += effect.accepted
        elif action >= 0.98:  # the link is cut: everything on its way is lost, the session opened anew
            uplink.clear()
            downlink.clear()
            server = TinyServer(PROMPT, truth)
            server.committed_len = buffer.committed_len
            buffer.reopened()
            ready = True
        if buffer.committed_len > len(PROMPT):
            assert list(buffer.committed) == truth[: buffer.committed_len]
        assert mirror.tokens == buffer.sequence()
        assert buffer.draft_ahead <= buffer.draft_ahead_limit
        assert buffer.committed_len <= buffer.sent <= buffer.length
    return accepted, verified


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), right=st.sampled_from([0.0, 0.5, 0.9, 1.0]), stream=st.booleans())
def test_any_interleaving_commits_the_servers_text(seed: int, right: float, stream: bool) -> None:
    buffer = DraftBuffer(PROMPT, stream=stream, draft_ahead_limit=8)
    interleave(buffer, seed, right, Mirror(PROMPT))


def test_a_mirror_that_misses_one_rollback_is_noticed() -> None:
    class Deaf(Mirror):
        def follow(self, effect: CommitEffect) -> None:
            super().follow(effect._replace(rollback_to=None))

    buffer = DraftBuffer(PROMPT, stream=True, draft_ahead_limit=8)
    with pytest.raises(AssertionError):
        interleave(buffer, 1, 0.5, Deaf(PROMPT))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_a_perfect_draft_is_never_dropped(seed: int) -> None:
    buffer = DraftBuffer(PROMPT, stream=True, draft_ahead_limit=8)
    accepted, verified = interleave(buffer, seed, 1.0, Mirror(PROMPT))
    assert buffer.epoch == 0
    # A random walk may end before the server verifies any draft.
    assert accepted > 0 or verified == 0
    assert accepted <= verified


def test_a_late_draft_of_a_stream_is_no_guess() -> None:
    buffer = DraftBuffer(PROMPT, stream=True)
    buffer.propose(1)
    late = buffer.on_commit(4, [1], 0, drafted=0)
    assert (late.proactive, late.proactive_hit) == (False, False)
    for token in (2, 3):
        buffer.propose(token)
    guessed = buffer.on_commit(6, [2, 3], 1, drafted=1)
    assert guessed.proactive
    assert guessed.proactive_hit
