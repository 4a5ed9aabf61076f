"""Tokens to text, piece by piece: never half a character, never past a stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_BROKEN = "\ufffd"


class TextStream:
    """Turns the tokens of one response into pieces of text that can be shown at once.

    Text is held back while its last character may be incomplete (a character's bytes can span tokens) and while its
    end could still become a stop string. The pieces joined are the decoding of all tokens, cut before the first stop
    string.

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
        if self.stopped:
            return ""
        self._ids += token_ids
        before = self._decode(self._ids[self._start : self._shown])
        now = self._decode(self._ids[self._start :])
        if now.endswith(_BROKEN) or len(now) <= len(before):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return self._release(now[len(before) :], final=False)

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
