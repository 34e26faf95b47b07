"""Drafters of the edge: replayed traces and prompt lookup."""

from __future__ import annotations

import random

import pytest
from fake_pair import hash_trace
from hypothesis import given, settings
from hypothesis import strategies as st

from wispprof.backends import Drafter
from wispprof.drafters.lookup_first import LookupFirst, _Tried
from wispprof.drafters.ngram import LookupDrafter, LookupMemory
from wispprof.drafters.replay import ReplayDrafter
from wispprof.drafters.suffix_index import SuffixIndex
from wispprof.errors import ProfileError
from wispprof.testing.fake_engine import FakeDrafter, FakeTarget
from wispprof.types import DraftFeatures, DraftToken, Sampling

TRACE = hash_trace(paths=3, length=30, depth=6)


# --- replay ---------------------------------------------------------------------------------------


def test_replay_proposes_what_the_draft_model_did() -> None:
    for path in TRACE.paths:
        real, replay = FakeDrafter(FakeTarget(), 0.75), ReplayDrafter(TRACE)
        for row in range(len(path.path) - TRACE.depth):
            start = (*path.prompt, *path.path[:row])
            real.open(start, Sampling())
            replay.open(start, Sampling())
            for _ in range(TRACE.depth):
                ours, theirs = replay.draft(), real.draft()
                assert ours.token == theirs.token
                assert ours.features == pytest.approx(theirs.features, rel=1e-6)


def test_replay_on_the_true_path_goes_beyond_the_depth_of_a_row() -> None:
    perfect = hash_trace(paths=1, length=30, depth=3, accuracy=1.0)
    drafter = ReplayDrafter(perfect)
    path = perfect.paths[0]
    drafter.open(path.prompt, Sampling())
    drafted = [drafter.draft().token for _ in range(20)]
    assert drafted == list(path.path[:20])


def test_replay_rolls_back_and_extends_like_a_model() -> None:
    path = TRACE.paths[0]
    real, replay = FakeDrafter(FakeTarget(), 0.75), ReplayDrafter(TRACE)
    rng = random.Random(3)
    for drafter in (real, replay):
        drafter.open(path.prompt, Sampling())
    committed = 0
    while committed < len(path.path) - 8:
        count = rng.randrange(6)
        ours = [replay.draft().token for _ in range(count)]
        theirs = [real.draft().token for _ in range(count)]
        assert ours == theirs
        accepted = 0
        while accepted < count and ours[accepted] == path.path[committed + accepted]:
            accepted += 1
        committed += accepted
        for drafter in (real, replay):
            drafter.rollback(len(path.prompt) + committed)
            drafter.extend([path.path[committed]])
        committed += 1
        assert replay.length == real.length


def test_replay_refuses_strange_text() -> None:
    drafter = ReplayDrafter(TRACE)
    with pytest.raises(ProfileError, match="no path for this prompt"):
        drafter.open([1, 2, 3], Sampling())
    path = TRACE.paths[0]
    drafter.open(path.prompt, Sampling())
    with pytest.raises(ProfileError, match="left the trace's path"):
        drafter.extend([path.path[0] ^ 1])
    drafter.extend(path.path)
    assert not drafter.can_draft


# --- lookup ---------------------------------------------------------------------------------------


def test_lookup_continues_the_last_occurrence() -> None:
    drafter = LookupDrafter(longest=3, shortest=2)
    drafter.open([1, 2, 3, 4, 9, 1, 2, 3], Sampling())
    assert [drafter.draft().token for _ in range(3)] == [4, 9, 1]
    drafter.rollback(8)
    drafter.extend([7, 5, 2, 3])
    assert drafter.draft().token == 7  # the later of two continuations


def test_lookup_cannot_draft_without_a_match() -> None:
    drafter = LookupDrafter()
    drafter.open([1, 2, 3, 4], Sampling())
    assert not drafter.can_draft
    assert drafter.confidence() == 0.0
    assert drafter.draft().features.confidence == pytest.approx(0.01)


def test_lookup_learns_its_confidence() -> None:
    def confidence(right: bool) -> float:
        drafter = LookupDrafter(longest=2, shortest=2)
        drafter.open([1, 2, 3, 4] * 2, Sampling())
        for _ in range(20):
            at = drafter.length
            token = drafter.draft().token
            drafter.rollback(at + right)
            drafter.extend([] if right else [token])
            if right:
                drafter.extend([])
        return drafter.confidence()

    assert confidence(True) > 0.8
    assert confidence(False) < 0.2


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_lookup_after_any_history_equals_a_fresh_one(seed: int) -> None:
    rng = random.Random(seed)
    drafter = LookupDrafter(longest=3, shortest=1)
    text = [rng.randrange(3) for _ in range(4)]
    drafter.open(text, Sampling())
    for _ in range(30):
        action = rng.random()
        if action < 0.5:
            text.append(drafter.draft().token)
        elif action < 0.75:
            cut = rng.randrange(1, len(text) + 1)
            drafter.rollback(cut)
            del text[cut:]
        else:
            more = [rng.randrange(3) for _ in range(rng.randrange(3))]
            drafter.extend(more)
            text += more
        fresh = LookupDrafter(longest=3, shortest=1)
        fresh.open(text, Sampling())
        assert drafter._followers.keys() >= fresh._followers.keys()
        assert {k: v for k, v in drafter._followers.items() if v} == fresh._followers
        assert drafter.length == len(text)


def test_lookup_finds_what_an_earlier_request_said() -> None:
    memory = LookupMemory(limit=64)
    answer = [7, 8, 9, 10, 11, 12]
    memory.remember([1, 2, *answer])
    drafter = LookupDrafter(memory)
    drafter.open([5, 6, 7, 8, 9], Sampling())
    assert [drafter.draft().token for _ in range(3)] == [10, 11, 12]
    assert not drafter.can_draft  # the answer ended there
    blank = LookupDrafter(LookupMemory(0))
    blank.open([5, 6, 7, 8, 9], Sampling())
    assert not blank.can_draft


def test_the_most_frequent_continuation_wins() -> None:
    memory = LookupMemory(limit=64)
    for first, last in ((20, 4), (21, 5), (22, 5)):
        memory.remember([first, 1, 2, 3, last])
    drafter = LookupDrafter(memory)
    drafter.open([9, 1, 2, 3], Sampling())
    assert drafter.draft().token == 5


def test_memory_is_bounded_and_a_conversation_is_kept_once() -> None:
    memory = LookupMemory(limit=10)
    memory.remember([1, 2, 3])
    memory.remember([1, 2, 3, 4, 5])
    assert memory.tokens == 5
    memory.remember([6] * 7)
    assert memory.tokens == 7
    memory.remember(range(100))
    assert memory.tokens == 10
    off = LookupMemory(limit=0)
    off.remember([1, 2, 3])
    assert off.tokens == 0
    assert off.index() is None


def test_confidences_are_those_of_the_device() -> None:
    memory = LookupMemory(limit=64)
    for _ in range(12):
        drafter = LookupDrafter(memory)
        drafter.open([1, 2, 3, 4, 1, 2], Sampling())
        assert drafter.draft().token == 3
        drafter.rollback(6)
        drafter.extend([9])
    drafter = LookupDrafter(memory)
    drafter.open([1, 2, 3, 4, 1, 2], Sampling())
    assert drafter.confidence() < 0.2


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=30), max_size=6), st.integers(0, 99))
def test_the_index_agrees_with_a_plain_search(sequences: list[list[int]], seed: int) -> None:
    text = random.Random(seed).choices(range(4), k=12)
    found = SuffixIndex(sequences).follower(text, 2)
    for length in range(12, 1, -1):
        wanted = text[-length:]
        after = [
            sequence[place + length]
            for sequence in sequences
            for place in range(len(sequence) - length)
            if sequence[place : place + length] == wanted
        ]
        ends = any(sequence[-length:] == wanted for sequence in sequences)
        if after or ends:
            break
    if not after:
        assert found is None
    else:
        assert found is not None
        assert found.length == length
        assert after.count(found.token) == max(map(after.count, after))


class RecordingDrafter(Drafter):
    """A drafter that records what it read, and always proposes 99."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    @property
    def length(self) -> int:
        return len(self.tokens)

    def open(self, tokens, sampling) -> None:  # type: ignore[no-untyped-def]
        self.tokens = list(tokens)

    def draft(self) -> DraftToken:
        self.tokens.append(99)
        return DraftToken(99, DraftFeatures(0.5, 0.5, 1.0, 1.0))

    def rollback(self, length: int) -> None:
        assert length <= len(self.tokens)
        del self.tokens[length:]

    def extend(self, tokens) -> None:  # type: ignore[no-untyped-def]
        self.tokens += list(tokens)


def test_lookup_first_asks_the_surer_one() -> None:
    def drafted(right: bool) -> list[int]:
        model = RecordingDrafter()
        drafter = LookupFirst(LookupDrafter(), model)
        drafter.open([1, 2, 3, 4, 5], Sampling())
        for _ in range(40):  # the model alone: nothing in the text to look up
            at = drafter.length
            drafter.draft()
            drafter.rollback(at + right)
            drafter.extend([100 + at])
        drafter.extend([1, 2, 3])
        return [drafter.draft().token]

    assert drafted(right=True) == [99]  # the model is nearly always right
    assert drafted(right=False) == [4]


class Oracle(RecordingDrafter):
    """Knows the path; wrong at every position of ``wrong``."""

    def __init__(self, path: list[int], wrong: set[int]) -> None:
        super().__init__()
        self._path, self._wrong = path, wrong

    def draft(self) -> DraftToken:
        place = len(self.tokens)
        self.tokens.append(-5 if place in self._wrong else self._path[place])
        return DraftToken(self.tokens[-1], DraftFeatures(0.5, 0.5, 1.0, 1.0))


def accepted(drafter: Drafter, path: list[int], k: int = 4) -> float:
    """Drafts accepted per round along the path."""
    drafter.open(path[:1], Sampling())
    right = rounds = 0
    while drafter.length + k < len(path):
        at = drafter.length
        drafts = [drafter.draft().token for _ in range(k) if drafter.can_draft]
        same = 0
        while same < len(drafts) and drafts[same] == path[at + same]:
            same += 1
        drafter.rollback(at + same)
        drafter.extend([path[at + same]])
        right, rounds = right + same, rounds + 1
    return right / rounds


def test_lookup_first_compares_where_both_have_a_proposal() -> None:
    # Half of the text is new and too hard for the model. The other half repeats itself in part, so that
    # lookup is right more often than the model overall, and less often than the model there.
    rng = random.Random(4)
    path: list[int] = []
    wrong: set[int] = set()
    for part in range(60):
        wrong.update(range(len(path), len(path) + 16))
        path += range(1000 + 100 * part, 1016 + 100 * part)
        wrong.update(at for at in range(len(path), len(path) + 24) if rng.random() < 0.1)
        path += [7 if rng.random() < 0.75 else 8 for _ in range(24)]
    model = accepted(Oracle(path, wrong), path)
    lookup = accepted(LookupDrafter(LookupMemory(0)), path)
    both = accepted(LookupFirst(LookupDrafter(LookupMemory(0)), Oracle(path, wrong)), path)
    assert lookup < model
    assert both > 0.95 * model


def test_luck_does_not_decide_between_lookup_and_model() -> None:
    def asked(lookup: float, model: float, rounds: int) -> bool:
        """Whether lookup drafts after so many rounds in which these shares of both proposals were right."""
        drafter = LookupFirst(LookupDrafter(LookupMemory(0)), RecordingDrafter())
        drafter.open([1, 2, 3, 4, 1, 2, 3], Sampling())
        found = drafter._lookup.proposal()
        assert found is not None
        for number in range(rounds):
            right = [int((number + 1) * share) > int(number * share) for share in (lookup, model)]
            drafter._judge(_Tried(found.kind, 4 if right[0] else 5, 4 if right[1] else 5), 4)
        return drafter.draft().token == found.token

    assert not asked(0.6, 0.5, 10)
    assert not asked(0.5, 0.5, 100)
    assert asked(0.9, 0.5, 10)
    assert asked(0.65, 0.5, 60)


def test_lookup_first_reads_the_prompt_ahead() -> None:
    model = RecordingDrafter()
    drafter = LookupFirst(LookupDrafter(), model)
    drafter.open([1, 2, 3], Sampling())
    drafter.extend([4])
    drafter.prefill()
    assert model.tokens == [1, 2, 3, 4]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_lookup_first_keeps_the_model_in_step(seed: int) -> None:
    rng = random.Random(seed)
    model = RecordingDrafter()
    drafter = LookupFirst(LookupDrafter(longest=2, shortest=1, prior=(1.5, 1.0)), model, min_confidence=0.5)
    text = [rng.randrange(3) for _ in range(6)]
    drafter.open(text, Sampling())
    for _ in range(40):
        action = rng.random()
        if action < 0.5:
            text.append(drafter.draft().token)
        elif action < 0.75:
            cut = rng.randrange(1, len(text) + 1)
            drafter.rollback(cut)
            del text[cut:]
        else:
            drafter.extend([rng.choice([0, 1, 99])])
            text.append(drafter._lookup._tokens[-1])
        assert drafter.length == len(text)
        assert model.tokens + drafter._unread == text
