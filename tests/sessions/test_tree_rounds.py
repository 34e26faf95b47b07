"""Rounds that are trees, on edge and server together: one text, whatever is lost or comes twice."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
from fake_tree_drafter import FakeTreeDrafter
from hypothesis import given, settings
from hypothesis import strategies as st

from wispprof.policies.controllers import FixedController
from wispprof.policies.interface import Controller, RoundContext, ScheduledItem, TreeShape
from wispprof.policies.stopping import WispprofController
from wispprof.sessions.draft_buffer import CommitEffect, Outgoing
from wispprof.sessions.edge_session import EdgeSession
from wispprof.sessions.edge_tree import EdgeTree, RatedCandidates
from wispprof.sessions.session_state import CommitResult, SessionState
from wispprof.sessions.tree_drafting import TreeStep
from wispprof.settings.edge_settings import DraftingSettings
from wispprof.testing.fake_engine import FakeEngine, FakeTarget
from wispprof.token_tree import ROOT
from wispprof.types import Sampling, Slo

PROMPT, VOCAB, STOP = [1, 2, 3, 4], 24, 10  # which the target says as its 49th token
TREES = DraftingSettings(tree_nodes=8, tree_depth=6, tree_width=3, tree_beams=3, proactive=4)


class ShapedController(FixedController):
    """Asks for a shape of its own."""

    wanted: TreeShape | None = TreeShape()

    def shape(self, context: RoundContext) -> TreeShape | None:
        return self.wanted


class Pair:
    """An edge and its server, with a link that the dice decide about."""

    def __init__(
        self,
        dice: random.Random,
        drafting: DraftingSettings,
        accuracy: float,
        max_new: int,
        stream: bool = False,
    ) -> None:
        target, sampling = FakeTarget(VOCAB), Sampling()
        self.dice = dice
        self.drafting = drafting
        self.max_new = max_new
        self.stream = stream
        self.server_ms = 1.0 if stream else 20.0  # so long that outcomes are prepared
        self.moves = [self.draft, self.send, self.serve, self.draft] + stream * 3 * [self.draft, self.send]
        self.drafter = FakeTreeDrafter(target, accuracy)
        self.drafter.open(PROMPT, sampling)
        self.held = list(PROMPT)
        self.edge = EdgeSession(
            PROMPT,
            max_new,
            Slo(10.0),
            drafting,
            FixedController(6),
            stop=(STOP,),
            stream=stream,
            trees=drafting.tree_nodes > 0,
        )
        self.engine = FakeEngine(VOCAB, trees=True)
        self.number = 0
        self.now = 0.0
        self.step: TreeStep | None = None
        self.stepping = False
        self.drafted = self.hits = self.dropped = self.kept = self.branches = self.guesses = self.rounds = 0
        self.frames: list[Outgoing] = []
        self.commits: list[CommitResult] = []
        self.open()

    def open(self) -> None:
        self.number += 1
        tokens = list(self.edge.buffer.committed)
        self.name = str(self.number)
        self.engine.open(self.name, Sampling())
        self.server = SessionState(
            self.name,
            tokens,
            slo=Slo(10.0),
            max_new=self.max_new,
            max_context=200,
            now_ms=self.now,
            generated=len(tokens) - len(PROMPT),
            stop=(STOP,),
            stream=self.stream,
        )
        self.frames.clear()
        self.commits.clear()

    def reconnect(self) -> None:
        self.engine.close(self.name)
        self.open()
        dropped, _ = self.edge.reopened(self.stream, self.drafting.tree_nodes > 0)
        self.dropped += dropped

    # --- the edge ---

    def draft(self) -> None:
        """Begin a draft step, or end the one that runs."""
        edge = self.edge
        if not self.stepping:
            if edge.may_draft(self.now):
                self.step, self.stepping = edge.begin_step(), True
                self.sequence = edge.buffer.sequence()
            return
        self.stepping = False
        same = 0
        while same < min(len(self.held), len(self.sequence)) and self.held[same] == self.sequence[same]:
            same += 1
        if same < len(self.held):
            self.drafter.rollback(same)
        if same < len(self.sequence):
            self.drafter.extend(self.sequence[same:])
        self.held = list(self.sequence)
        if self.step is None:
            token = self.drafter.draft()
            self.held.append(token.token)
            self.drafted += 1
            self.dropped += edge.end_step(lambda: token, 4.0) is not None
        else:
            found = self.drafter.expand(self.step.tree, self.step.nodes, self.step.width)
            edge.end_tree_step(found, 4.0)

    def send(self) -> None:
        frame = self.edge.next_frame(self.now)
        if frame is not None:
            self.edge.sent(frame, self.now)
            self.frames.append(frame)
            self.branches += bool(frame.parents)
            assert len(frame.tokens) <= max(self.drafting.tree_nodes, self.drafting.draft_ahead)

    def take(self, commit: CommitResult) -> CommitEffect:
        effect = self.edge.on_commit(
            self.now, commit.committed_len, commit.tokens, commit.accepted, commit.drafted, self.server_ms
        )
        assert effect is not None
        self.hits += effect.hits
        self.dropped += effect.dropped_tokens
        self.kept += effect.kept
        self.guesses += effect.proactive_hit
        self.rounds += bool(effect.tokens)
        assert effect.wasted_ms <= effect.dropped_ms + 1e-9
        return effect

    # --- the server ---

    def serve(self) -> None:
        server, dice = self.server, self.dice
        for frame in [one for one in self.frames if dice.random() < 0.7]:
            server.merge(
                frame.epoch,
                frame.base,
                frame.tokens,
                frame.acceptance_prob,
                self.now,
                10.0,
                frame.draft_ms,
                frame.parents,
            )
            if dice.random() < 0.7:  # else it comes again, late
                self.frames.remove(frame)
        view = server.view(self.now)
        if not view.ready or server.finished:
            return
        drafts = (
            dice.randrange(len(view.acceptance_probs) + 1)
            if dice.random() < 0.3
            else len(view.acceptance_probs)
        )
        item = ScheduledItem(self.name, drafts, view.prompt_left)
        [result] = self.engine.step([server.step_input(item, self.now)])
        commit = server.apply(result, self.now)
        if commit.rollback is not None:
            self.engine.rollback(self.name, commit.rollback)
        assert self.engine.cached(self.name) == server.cached
        self.commits.append(commit)

    # --- both ---

    def sound(self) -> None:
        counters, buffer = self.server.counters, self.edge.buffer
        pending = len(self.server.pending_drafts)
        self.drafted += buffer.new_nodes()
        assert counters.drafted == counters.accepted + counters.matched + counters.wasted + pending
        assert self.drafted == self.hits + self.dropped + buffer.undecided[0]
        held = buffer.tree
        if held is not None:
            assert buffer.draft_ahead == 0
            assert held.known.keys() <= {ROOT, *range(len(held.tree))}
            assert held.sent <= set(range(len(held.tree)))
            assert max(held.tree.depths, default=0) <= buffer.depth_left

    def run(self) -> list[int]:
        dice, idle = self.dice, 0
        while not self.server.finished or self.commits:
            self.now += 1.0
            before = self.edge.buffer.committed_len
            for move in dice.choices(self.moves, k=3):
                move()
            while self.commits and dice.random() < 0.7:
                commit = self.commits.pop(0)
                self.take(commit)
                if dice.random() < 0.1:
                    assert not self.take(commit).tokens
            self.sound()
            if dice.random() < 0.01 and not self.server.finished:
                self.reconnect()
            idle = 0 if self.edge.buffer.committed_len > before else idle + 1
            assert idle < 300, "nobody goes on"
        return list(self.edge.buffer.committed[len(PROMPT) :])


def wanted(count: int) -> list[int]:
    text = FakeTarget(VOCAB).generate(PROMPT, count)
    return text[: text.index(STOP) + 1] if STOP in text else text


def pair(
    seed: int,
    drafting: DraftingSettings = TREES,
    accuracy: float = 0.6,
    max_new: int = 40,
    stream: bool = False,
) -> Pair:
    return Pair(random.Random(seed), drafting, accuracy, max_new, stream)


@pytest.mark.parametrize("stream", [False, True])
@given(
    seed=st.integers(0, 1 << 40),
    accuracy=st.sampled_from([0.0, 0.4, 0.8, 1.0]),
    max_new=st.integers(1, 60),
    nodes=st.integers(0, 20),
)
@settings(max_examples=150, deadline=None)
def test_any_interleaving_gives_the_targets_text(
    stream: bool, seed: int, accuracy: float, max_new: int, nodes: int
) -> None:
    drafting = replace(TREES, tree_nodes=nodes, proactive=seed % 6)
    one = pair(seed, drafting, accuracy, max_new, stream)
    assert one.run() == wanted(max_new)


def test_a_streams_trees_go_on_where_its_chains_are_lost() -> None:
    trees = [pair(seed, stream=True) for seed in range(30)]
    chains = [pair(seed, replace(TREES, tree_nodes=0), stream=True) for seed in range(30)]
    for one in (*trees, *chains):
        assert one.run() == wanted(40)
    assert sum(one.branches for one in trees) > 100
    assert not any(one.branches for one in chains)
    assert sum(one.rounds for one in trees) < 0.9 * sum(one.rounds for one in chains)
    assert sum(one.server.counters.wasted for one in trees) < sum(one.drafted for one in trees)


def test_trees_are_sent_and_what_stands_of_them_is_kept() -> None:
    trees = [pair(seed) for seed in range(30)]
    chains = [pair(seed, replace(TREES, tree_nodes=0)) for seed in range(30)]
    for one in (*trees, *chains):
        assert one.run() == wanted(40)
    assert sum(one.branches for one in trees) > 30
    assert sum(one.guesses for one in trees) > 10
    assert sum(one.kept for one in trees) > 30
    assert not any(one.branches for one in chains)
    assert sum(one.rounds for one in trees) < sum(one.rounds for one in chains)


class Forgetful(FakeTreeDrafter):
    """Keeps no KV of a tree when the text goes on."""

    def extend(self, tokens: Sequence[int]) -> None:
        super().extend(tokens)
        self._expanded = set()


def test_a_drafter_that_forgets_the_subtree_is_noticed() -> None:
    def run(seed: int) -> None:
        one = pair(seed)
        one.drafter = Forgetful(FakeTarget(VOCAB), 0.6)
        one.drafter.open(PROMPT, Sampling())
        one.run()

    with pytest.raises(ValueError, match="not expanded"):
        [run(seed) for seed in range(20)]


# --- the parts ---


def started(controller: Controller, rtt_ms: float = 0.0) -> EdgeSession:
    session = EdgeSession(PROMPT, 40, Slo(10.0), TREES, controller, trees=True, rtt_ms=rtt_ms)
    session.on_commit(0.0, 5, [7], 0, 0, 1.0)
    return session


def test_a_controller_may_choose_the_shape_and_settings_bound_it() -> None:
    controller = ShapedController(6)
    session = started(controller)
    controller.wanted = TreeShape(nodes=50, depth=3, width=9, beams=2)
    assert session.next_frame(1.0) is None
    step = session.begin_step()
    assert step is not None
    assert (step.nodes, step.width) == ([ROOT], 3)
    for a_chain in (TreeShape(nodes=5, depth=5), None):
        controller.wanted = a_chain
        chain = started(controller)
        assert chain.next_frame(1.0) is None
        assert chain.begin_step() is None
    # This one does not know what nodes cost.
    planned = started(WispprofController(stream=False), rtt_ms=200.0)
    assert planned.next_frame(1.0) is None
    assert planned.begin_step() is not None
    controller.k = 0
    none = started(controller)
    frame = none.next_frame(1.0)
    assert frame is not None
    assert (frame.tokens, none.scheduler.declined) == ((), 1)


def test_without_settings_or_server_drafts_are_chains() -> None:
    for drafting, more in (
        (replace(TREES, tree_nodes=0), {"trees": True}),
        (TREES, {"trees": False}),
        (TREES, {"trees": False, "stream": True}),
        (replace(TREES, tree_nodes=None), {"trees": True}),
        (replace(TREES, tree_nodes=None), {"trees": True, "stream": True}),
        (replace(TREES, tree_width=1), {"trees": True, "stream": True}),
        (replace(TREES, tree_width=1), {"trees": True}),
    ):
        session = EdgeSession(PROMPT, 40, Slo(10.0), drafting, FixedController(6), **more)
        session.on_commit(0.0, 5, [7], 0, 0, 1.0)
        assert session.next_frame(1.0) is None
        assert session.may_draft(1.0)
        assert session.begin_step() is None


@pytest.mark.parametrize("stream", [False, True])
def test_a_controller_may_change_between_trees_and_chains(stream: bool) -> None:
    """No node is lost on the way: what is left of a tree is used up before a chain begins."""
    dice = random.Random(5)

    class Fickle(ShapedController):
        def shape(self, context: RoundContext) -> TreeShape | None:
            return TreeShape(12, 5, 3, 3) if dice.random() < 0.5 else None

    frames = 0
    for seed in range(20):
        one = pair(seed, stream=stream)
        one.edge.scheduler.resume(Fickle(6))
        assert one.run() == wanted(40)
        frames += one.branches
    assert frames > 20


def test_a_commit_moves_the_subtree_and_its_times() -> None:
    one = EdgeTree([1, 2, 3], [0.9, 0.8, 0.7], [1.0, 2.0, 4.0])
    one.tree.add(0, 5, 0.1)
    one.tree.add(3, 6, 0.5)
    one._draft_ms += [8.0, 16.0]
    one.known = dict.fromkeys((ROOT, 0, 1, 3), RatedCandidates())
    one.send([0, 1, 3])
    done = one.commit([1, 2], 2)
    assert (done.hits, done.rejected, done.dropped, done.dropped_ms, done.depth) == (2, False, 2, 24.0, 2)
    assert (one.tree.tokens, set(one.known), one.sent, one.draft_ms) == ([3], {ROOT}, set(), 4.0)
    assert done.moved == {1: ROOT, 2: 0}
    done = one.commit([4], 1)
    assert (done.rejected, done.proactive) == (True, False)
    assert len(one.tree) == 0
