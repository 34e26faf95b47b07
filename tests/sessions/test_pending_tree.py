"""The server's drafts as a tree: merged by path, taken best first, and walked with what is committed."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wispprof.policies.interface import ScheduledItem
from wispprof.sessions.plan_ahead import expected_view, next_input
from wispprof.sessions.session_state import SessionState
from wispprof.token_tree import ROOT, TokenTree
from wispprof.types import Slo, StepInput, VerifyResult

NAME, VOCAB, PROMPT = "s", 4, [1, 2, 0, 1]


def target(prefix: Sequence[int]) -> int:
    """A target over a few tokens: a hash of the prefix, so chance hits and misses are both common."""
    return hashlib.blake2b(bytes(prefix), digest_size=1).digest()[0] % VOCAB


def truth(prefix: Sequence[int], count: int) -> list[int]:
    out: list[int] = []
    while len(out) < count:
        out.append(target([*prefix, *out]))
    return out


def answer(session: SessionState, fed: StepInput, blind: bool = False) -> VerifyResult:
    """What an engine decides. ``blind``: one that takes every tree for a chain."""
    if not fed.needs_logits:
        return VerifyResult(fed.session, 0, ())
    tokens, first = list(fed.tokens), len(fed.tokens) - fed.drafts
    chain = range(ROOT, fed.drafts - 1)
    parents = chain if blind or not len(fed.parents) else fed.parents
    child = {
        (parent, token): node
        for node, (parent, token) in enumerate(zip(parents, tokens[first:], strict=True))
    }
    prefix, node, out = session.tokens[: session.cached] + tokens[:first], ROOT, list[int]()
    while True:
        out.append(target(prefix))
        prefix.append(out[-1])
        following = child.get((node, out[-1]))
        if following is None:
            return VerifyResult(fed.session, len(out) - 1, tuple(out))
        node = following


def started(**changes: object) -> SessionState:
    options: dict[str, object] = {"slo": Slo(10.0), "max_new": 40, "max_context": 100, "now_ms": 0.0}
    session = SessionState(NAME, PROMPT, **{**options, **changes})  # type: ignore[arg-type]
    session.apply(answer(session, session.step_input(ScheduledItem(NAME, prefill=4), 5.0)), 10.0)
    return session


def give(
    session: SessionState, tree: TokenTree, base: int | None = None, epoch: int = 0, now: float = 20.0
) -> str:
    place = session.committed_len if base is None else base
    return session.merge(epoch, place, tree.tokens, tree.acceptance_probs, now, 100.0, 4.0, tree.parents)


def branching(*paths: tuple[Sequence[int], float]) -> TokenTree:
    """A tree of some paths, each with the acceptance probability of all its nodes."""
    tree = TokenTree()
    for path, prob in paths:
        node = ROOT
        for token in path:
            added = tree.add(node, token, prob)
            assert added is not None
            node = added
    return tree


def sound(session: SessionState) -> None:
    counters, drafts = session.counters, session.drafts
    accounted = counters.accepted + counters.matched + counters.wasted + len(session.pending_drafts)
    assert counters.drafted == accounted
    assert min(counters.accepted, counters.matched, counters.wasted) >= 0
    assert len(drafts.tokens) == len(drafts.acceptance_probs) <= session.max_pending_drafts
    assert all(0.0 <= prob <= 1.0 for prob in drafts.acceptance_probs)
    if drafts.tree is not None:
        assert not drafts.tree.is_chain
        assert max(drafts.tree.depths) < session.tokens_left
        assert sorted(drafts.tokens) == sorted(drafts.tree.tokens)


def paths(session: SessionState) -> set[tuple[int, ...]]:
    """What the session's drafts spell, path by path."""
    tree = session.drafts.tree
    if tree is None:
        held = session.pending_drafts
        return {tuple(held[: end + 1]) for end in range(len(held))}
    return {tuple(tree.spelled(node)) for node in range(len(tree))}


def step(session: SessionState, drafts: int, now: float = 30.0) -> StepInput:
    return session.step_input(ScheduledItem(NAME, drafts=drafts), now)


# --- what a step takes ---


def test_a_step_takes_the_likeliest_nodes_and_commits_their_path() -> None:
    session = started(stream=True)
    right = truth(session.tokens, 3)
    wrong = (right[0] + 1) % VOCAB
    tree = branching(([wrong], 0.5), (right[:2], 0.4), ([wrong, 0], 0.5))
    give(session, tree)
    view = session.view(25.0)
    products = [math.prod(view.acceptance_probs[: end + 1]) for end in range(4)]
    assert products == pytest.approx([0.5, 0.4, 0.25, 0.16])
    fed = step(session, 4)
    assert list(fed.tokens) == [session.tokens[-1], wrong, right[0], 0, right[1]]
    assert list(fed.parents) == [ROOT, ROOT, 0, 1]
    done = session.apply(answer(session, fed), 40.0)
    assert (done.tokens, done.accepted, done.drafted, done.depth) == (tuple(right), 2, 4, 2)
    assert session.cached == session.committed_len - 1
    assert session.pending_drafts == []
    sound(session)


def test_a_leading_part_without_branches_is_fed_as_a_chain() -> None:
    session = started(stream=True)
    give(session, branching(([1, 2, 3], 0.9), ([0], 0.1)))
    assert step(session, 3).parents == ()
    session.cancel()
    assert list(step(session, 4).parents) == [ROOT, 0, 1, ROOT]


def test_what_was_cut_stands_if_the_text_goes_on_with_it() -> None:
    session = started(stream=True)
    right = truth(session.tokens, 4)
    wrong = [(token + 1) % VOCAB for token in right]
    # The step holds one right node; the target's own token is one of its children.
    give(
        session,
        branching((right[:1], 0.9), ([right[0], wrong[1]], 0.2), (right, 0.3), ([*right[:2], wrong[2]], 0.3)),
    )
    session.apply(answer(session, step(session, 1)), 40.0)
    assert paths(session) == {(right[2],), (right[2], right[3]), (wrong[2],)}
    assert give(session, branching((right[2:], 0.5))) == ""
    counters = session.counters
    assert (counters.accepted, counters.matched, counters.wasted) == (1, 1, 1)
    sound(session)


# --- merging ---


def test_siblings_join_by_path_and_a_known_frame_changes_nothing() -> None:
    session = started(stream=True)
    give(session, branching(([1, 2, 3], 0.5)))
    assert session.drafts.tree is None
    assert give(session, branching(([3], 0.2)), base=session.committed_len + 1) == ""
    assert paths(session) == {(1,), (1, 2), (1, 3), (1, 2, 3)}
    held = list(session.pending_drafts)
    for again in (branching(([1, 2, 3], 0.9)), branching(([1, 3], 0.1), ([1, 2], 0.1))):
        assert give(session, again) == ""
    assert session.pending_drafts == held
    assert session.counters.drafted == 4
    # Drafts that follow the trunk: its first children.
    assert session.merge(0, session.committed_len + 3, [0], [0.5], 21.0, 0.0, 1.0) == ""
    assert (1, 2, 3, 0) in paths(session)
    assert session.merge(0, session.committed_len + 5, [0], [0.5], 21.0, 0.0, 1.0) == "gap"
    sound(session)


def test_a_late_tree_descends_along_the_committed_text() -> None:
    session = started(stream=True)
    base, right = session.committed_len, truth(session.tokens, 4)
    wrong = (right[0] + 1) % VOCAB
    session.apply(answer(session, step(session, 0)), 40.0)
    late = branching((right[:3], 0.5), ([wrong, 1], 0.3), ([right[0], (right[1] + 1) % VOCAB], 0.2))
    assert give(session, late, base=base) == "contradiction"
    assert session.counters.dropped == {"contradiction": 2}
    assert paths(session) == {(right[1],), tuple(right[1:3]), ((right[1] + 1) % VOCAB,)}
    # The epoch goes on: only a frame that the text leaves at a branch is refused as a whole.
    assert give(session, branching(([*right, 0], 0.5)), base=base) == ""
    assert give(session, branching((right[:1], 0.5)), base=base) == ""
    elsewhere = branching(([wrong], 0.5), ([(wrong + 1) % VOCAB], 0.5))
    assert give(session, elsewhere, base=base) == "contradiction"
    sound(session)


def test_a_tree_that_the_text_leaves_ends_its_epoch() -> None:
    session = started(stream=True)
    base, (right, *_) = session.committed_len, truth(session.tokens, 1)
    others = [token for token in range(VOCAB) if token != right]
    session.apply(answer(session, step(session, 0)), 40.0)
    assert give(session, branching(*(([token], 0.3) for token in others)), base=base) == "contradiction"
    assert give(session, branching(([0], 0.3)), epoch=0) == "epoch"
    assert give(session, branching(([0], 0.3)), epoch=1) == ""


def test_the_end_of_the_generation_bounds_depth_not_nodes() -> None:
    session = started(stream=True, max_new=3)  # one draft can be accepted, then the target's own token
    assert give(session, branching(([1, 2], 0.5), ([2], 0.3), ([3], 0.1))) == "overflow"
    assert paths(session) == {(1,), (2,), (3,)}
    assert len(session.view(25.0).acceptance_probs) == session.useful_drafts == 3
    assert session.fitted(ScheduledItem(NAME, drafts=3)) == ScheduledItem(NAME, drafts=3)
    assert session.apply(answer(session, step(session, 3)), 40.0).committed_len <= len(PROMPT) + 3
    tight = started(stream=True, max_context=8)  # five tokens so far: a step caches two nodes at most
    give(tight, branching(([1, 2], 0.5), ([2], 0.4), ([3], 0.1)))
    assert (len(tight.pending_drafts), tight.useful_drafts, len(tight.view(25.0).acceptance_probs)) == (
        4,
        2,
        2,
    )
    full = started(stream=True, max_pending_drafts=2)
    assert give(full, branching(([1, 2], 0.5), ([2], 0.3))) == "overflow"
    assert paths(full) == {(1,), (1, 2)}


def test_the_step_after_one_with_a_tree_follows_the_path_that_it_decides() -> None:
    session = started(stream=True)
    right = truth(session.tokens, 4)
    wrong = [(token + 1) % VOCAB for token in right]
    give(session, branching((right[:1], 0.9), ([wrong[0]], 0.05), ([right[0], right[1]], 0.8), (right, 0.7)))
    give(session, branching(([*right[:2], wrong[2]], 0.2)))
    fed = step(session, 1)
    view = expected_view(session, 35.0, 50.0)
    assert view is not None
    assert view.standing == pytest.approx(0.9 * 0.8)
    assert view.acceptance_probs == pytest.approx((0.7, 0.7, 0.2 / 0.49))
    planned = next_input(session, ScheduledItem(NAME, drafts=3))
    assert planned is not None
    after = planned.after(answer(session, fed))
    assert after == StepInput(NAME, [right[1], right[2], right[3], wrong[2]], 3, True, [ROOT, 0, ROOT])
    elsewhere = planned.after(VerifyResult(NAME, 0, (wrong[0],)))
    assert elsewhere == StepInput(NAME, [wrong[0]], 0, True)
    assert planned.after(VerifyResult(NAME, 1, (right[0], wrong[1]))) == StepInput(NAME, [wrong[1]], 0, True)
    session.apply(answer(session, fed), 40.0)
    session.begin(after, 40.0)
    assert not session.drafts.withdrawn
    session.apply(answer(session, after), 50.0)
    assert session.tokens[5:9] == right
    sound(session)


# --- properties ---


def drawn_tree(dice: random.Random, text: Sequence[int]) -> TokenTree:
    """A random tree, half of it along ``text``."""
    tree = TokenTree()
    for _ in range(dice.randrange(10)):
        node = dice.randrange(-1, len(tree))
        depth = 0 if node == ROOT else tree.depths[node]
        own = dice.random() < 0.5 and depth < len(text)
        tree.add(node, text[depth] if own else dice.randrange(VOCAB), dice.random())
    return tree


def rounds(seed: int, stream: bool, blind: bool = False) -> SessionState:
    """Random frames, lost, late, twice, of old and new epochs, trees and chains; steps of all sizes."""
    dice = random.Random(seed)
    session = started(stream=stream, max_new=dice.randrange(3, 40), max_pending_drafts=dice.choice((4, 64)))
    sent: list[tuple[int, int, TokenTree]] = []
    epoch, now, planned = 0, 20.0, None

    def arrive() -> None:
        nonlocal epoch
        if dice.random() < 0.3:
            epoch += 1
        base = max(1, session.committed_len + dice.randrange(-3, 4))
        text = session.tokens[base:] + truth(session.tokens, 6)
        sent.append((epoch, base, drawn_tree(dice, text[: 6 + max(0, session.committed_len - base)])))
        for chosen in dice.choices(sent, k=dice.randrange(3)):
            give(session, chosen[2], chosen[1], chosen[0], now)
            sound(session)
        if dice.random() < 0.3:
            chain = truth(session.tokens, dice.randrange(4))
            session.merge(epoch, session.committed_len, chain, [0.5] * len(chain), now, 9.0, 1.0)

    for _ in range(dice.randrange(40)):
        now += 5.0
        if dice.random() < 0.8:
            arrive()
        sound(session)
        if session.finished:
            break
        view = session.view(now)
        if planned is None and view.ready:
            planned = session.input_of(ScheduledItem(NAME, dice.randrange(len(view.acceptance_probs) + 1)))
            if dice.random() < 0.2:
                arrive()  # between planning and the step
        if planned is not None:
            session.begin(planned, now)
            result = answer(session, planned, blind)
            if dice.random() < 0.3:
                arrive()  # while the engine works
            expected = expected_view(session, now, now + 1.0)
            most = len(expected.acceptance_probs) if expected is not None else 0
            follows = next_input(session, ScheduledItem(NAME, dice.randrange(most + 1)))
            if dice.random() < 0.3:
                arrive()  # after the next step was planned
            planned = follows.after(result) if follows is not None and dice.random() < 0.5 else None
            done = session.apply(result, now + 1.0)
            assert done.rollback is not None or session.cached == session.committed_len - 1
            assert not (planned and session.finished)
        sound(session)
    return session


@given(st.integers(0, 1 << 40), st.booleans())
@settings(max_examples=250, deadline=None)
def test_committed_text_never_depends_on_the_trees_merged(seed: int, stream: bool) -> None:
    session = rounds(seed, stream)
    assert session.tokens[4:] == truth(PROMPT, len(session.tokens) - 4)


def test_a_tree_verified_as_a_chain_would_be_noticed() -> None:
    def wrong(seed: int) -> bool:
        session = rounds(seed, True, blind=True)
        agrees = session.tokens[4:] == truth(PROMPT, len(session.tokens) - 4)
        return not agrees or session.counters.accepted < rounds(seed, True).counters.accepted

    assert any(wrong(seed) for seed in range(40))


@given(st.integers(0, 1 << 40), st.permutations(range(4)))
@settings(max_examples=100, deadline=None)
def test_parts_of_a_tree_arrive_in_any_order_and_twice(seed: int, order: Sequence[int]) -> None:
    dice = random.Random(seed)
    tree = drawn_tree(dice, truth([*PROMPT, 0], 6))
    whole, parts = started(stream=True), started(stream=True)
    give(whole, tree)
    # Parts that begin at the root are trees of their own; later ones hold the earlier.
    for end in (*(len(tree) * (one + 1) // 4 for one in order), len(tree)):
        part = TokenTree()
        for node in range(end):
            part.add(tree.parents[node], tree.tokens[node], tree.acceptance_probs[node])
        give(parts, part)
    assert paths(whole) == paths(parts)
    assert whole.counters.drafted == parts.counters.drafted == len(tree)
