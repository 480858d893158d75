"""Stop texts in a stream of text whose pieces may end anywhere."""

from collections.abc import Sequence

from switchmamba.errors import ConfigError


class StopMatcher:
    """Passes text on until a stop text is complete, holding back what may yet become one.

    What comes out does not depend on how the text is cut into pieces. If several stop texts appear, the one
    that is complete first counts, the longest of those; it is not passed on.

    Attributes:
        stopped: a stop text has appeared; nothing may be pushed any more.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str) or "" in stops:
            raise ConfigError(f"stop = {stops!r} must be a sequence of texts that are not empty")
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, piece: str) -> str:
        """Take the next piece; return the text that is certainly not part of a stop text."""
        text = self._held + piece
        found = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)[1]]
        passed = len(text) - self._possible_beginning(text)
        self._held = text[passed:]
        return text[:passed]

    def flush(self) -> str:
        """Return what is held back: the text has ended."""
        held, self._held = self._held, ""
        return held

    def _possible_beginning(self, text: str) -> int:
        """Length of the longest end of ``text`` with which a stop text begins."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)
