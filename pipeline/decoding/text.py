"""Tokens to text, piece by piece: never half a character, never past a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_BROKEN = "\ufffd"
_MOST_WAITING = 8
"""Tokens after which text is no longer taken for a character that is still to be completed."""
_TAIL = 4
"""Tokens that may yet be: a character has at most as many bytes."""


class TextStream:
    """Turns the tokens of one response into pieces of text that can be shown at once.

    Text is held back while its last character may be incomplete (a character's bytes can span tokens) and while its
    end could still become a stop string. The pieces joined are the decoding of all tokens, cut before the first stop
    string. Tokens are looked at one by one, however many come together, so that two streams over the same tokens always
    agree; what one of them costs does not grow with the text.

    Args:
        decode: token ids -> text, special tokens left out.
        stop: strings that end the text; they are not part of it.
    Attributes:
        matched: the stop string that ended the text (of several that begin at one place the first given), or None.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._stop = tuple(stop)
        self._ids: list[int] = []
        # Tokens [start, shown) are decoded again with what follows them: some decoders look at the token before.
        self._start = 0
        self._shown = 0
        self._held = ""
        self.matched: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string came; nothing more comes after it."""
        return self.matched is not None

    def push(self, token_ids: Sequence[int]) -> str:
        """Adds tokens; returns the text that is certain now. After a stop string (`stopped`) nothing more comes."""
        return "".join(self._push(token) for token in token_ids)

    def _push(self, token: int) -> str:
        if self.stopped:
            return ""
        self._ids.append(token)
        before = self._decode(self._ids[self._start : self._shown])
        now = self._decode(self._ids[self._start :])
        waiting = len(self._ids) - self._shown
        if now.endswith(_BROKEN):
            return self._broken(before, now) if waiting > _MOST_WAITING else ""
        if len(now) <= len(before):
            if now == before and waiting > _MOST_WAITING:  # special tokens, which never become text
                del self._ids[self._shown :]
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return self._release(now[len(before) :], final=False)

    def _broken(self, before: str, now: str) -> str:
        """Releases bytes that never became characters, all but the last tokens."""
        end = len(self._ids) - _TAIL
        head = self._decode(self._ids[self._start : end])
        # Text follows that did not become one with it, so that it stays as it is.
        if not (len(before) < len(head) < len(now) and now.startswith(head)):
            return ""
        self._start, self._shown = self._shown, end
        return self._release(head[len(before) :], final=False)

    def finish(self) -> str:
        """The rest of the text, once no more tokens come; bytes that never became a character are U+FFFD."""
        if self.stopped:
            return ""
        before = self._decode(self._ids[self._start : self._shown])
        now = self._decode(self._ids[self._start :])
        self._start = self._shown = len(self._ids)
        return self._release(now[len(before) :], final=True)

    def _release(self, new: str, final: bool) -> str:
        text = self._held + new
        found = [(at, n) for n, at in enumerate(text.find(s) for s in self._stop) if at >= 0]
        if found:
            at, which = min(found)
            self.matched = self._stop[which]
            self._held = ""
            return text[:at]
        keep = 0 if final else max((_overlap(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
