"""Stop strings, matched while the text grows: constant time a character, however many there are."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopStrings:
    """An Aho-Corasick automaton of stop strings, shared by all choices of a request.

    A state is a prefix of a stop string: the longest one that the text ends with. ``depth``: its length.
    ``match``: the index of the first stop string that the text ends with in that state, or -1.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings = tuple(strings)
        self.next: list[dict[str, int]] = [{}]
        self.fail = [0]
        self.depth = [0]
        self.match = [-1]
        for number, string in enumerate(self.strings):
            state = 0
            for place, char in enumerate(string):
                if char not in self.next[state]:
                    self.next[state][char] = len(self.next)
                    self.next.append({})
                    self.fail.append(0)
                    self.depth.append(place + 1)
                    self.match.append(-1)
                state = self.next[state][char]
            if self.match[state] < 0:
                self.match[state] = number
        self._link()

    def _link(self) -> None:
        """Breadth first, give each state its longest proper suffix that is a state too."""
        waiting = deque(self.next[0].values())
        while waiting:
            state = waiting.popleft()
            for char, child in self.next[state].items():
                self.fail[child] = self.step(self.fail[state], char)
                inherited = self.match[self.fail[child]]
                if inherited >= 0:
                    own = self.match[child]
                    self.match[child] = inherited if own < 0 else min(own, inherited)
                waiting.append(child)

    def step(self, state: int, char: str) -> int:
        """The state after one more character."""
        while char not in self.next[state]:
            if not state:
                return 0
            state = self.fail[state]
        return self.next[state][char]


class StopStringFilter:
    """Passes text on up to the first stop string that is complete, of several the one listed first.

    Holds back what may be the beginning of one. ``hit``: the stop string found, or "". ``include``: show it
    too. A match is only looked for while ``active``.
    """

    def __init__(self, stop_strings: StopStrings, *, include: bool = False) -> None:
        self._stops = stop_strings
        self._include = include
        self._state = 0
        self._held: list[tuple[str, bool]] = []
        self.active = True
        self.hit = ""

    def push(self, text: str, visible: bool = True) -> str:
        """Add text; returns what may be shown, nothing after a hit. ``visible`` is false for the text of a
        special token that is matched but not shown."""
        if self.hit or not text:
            return ""
        stops, state = self._stops, self._state
        for place, char in enumerate(text):
            state = stops.step(state, char)
            if self.active and stops.match[state] >= 0:
                self.hit = stops.strings[stops.match[state]]
                self._held.append((text[: place + 1], visible))
                return self._show(0 if self._include else len(self.hit))
        self._state = state
        self._held.append((text, visible))
        return self._show(stops.depth[state])

    def finish(self) -> str:
        """The text held back: no stop string came of it."""
        return "" if self.hit else self._show(0)

    def _show(self, keep: int) -> str:
        """Take all but the last ``keep`` characters out of what is held, and return what of it is visible."""
        kept: list[tuple[str, bool]] = []
        while keep and self._held:
            text, visible = self._held.pop()
            cut = max(0, len(text) - keep)
            keep -= len(text) - cut
            kept.append((text[cut:], visible))
            if cut:
                self._held.append((text[:cut], visible))
        shown = "".join(text for text, visible in self._held if visible)
        self._held = [] if self.hit else kept[::-1]
        return shown
