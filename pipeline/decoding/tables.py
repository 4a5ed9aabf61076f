"""The page tables of the engine's requests: what each holds, takes for its next step, and leaves behind."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from pipeline.decoding.pages import PagePool, chain_key
from pipeline.decoding.request import Request, RequestRefused, Sequence

Tag = Callable[[Sequence, int], Hashable | None]
"""(request, end of a page in positions) -> what the page must bear for its draft to find its own keys there."""


class PageTables:
    """Keeps `Sequence.pages`, one table per request for the target and its draft.

    Args:
        keep: whether whole pages stay to be found by later prompts.
    """

    def __init__(self, pool: PagePool, *, keep: bool) -> None:
        self.pool, self.keep = pool, keep

    def most_tokens(self, block: int) -> int:
        """Of a prompt and its answer, were they alone, with `block` slots behind them."""
        return max(0, self.pool.pages * self.pool.size - block)

    def check(self, request: Request, block: int) -> None:
        """Raises RequestRefused for a request that would not fit were it alone, with `block` slots behind its text."""
        most = len(request.prompt_ids) + request.max_new_tokens
        if most > self.most_tokens(block):
            raise RequestRefused(
                f"is {most}; with a block of {block} behind them they would never fit the {self.pool.pages} pages of "
                f"{self.pool.size} tokens that there are. Raise engine.kv_gib, or free memory where it is 0.",
                request.id,
                "prompt_ids + max_new_tokens",
            )

    def admit(self, s: Sequence, tag: Tag, others: list[Sequence]) -> bool:
        """Gives a request pages for all that it has to read, found ones first; `s.computed` then counts what they hold.

        At least one position is left to compute: its logits, or what the draft is told of it, are needed. A request
        that is never drafted for takes pages of any draft and of none.

        Args:
            others: that hold pages; each must be left one to grow.
        Returns:
            False, with nothing changed, while there are too few pages, or while one of the others is computing the
            first page that it lacks.
        """
        size = self.pool.size
        found: list[int] = []
        if self.keep:
            for i in range((s.prefill_end - 1) // size):
                page = self.pool.find(self._key(s, i), _wanted(s, (i + 1) * size, tag))
                if page is None:
                    if self._comes(s, i, tag, others):
                        return False
                    break
                found.append(page)
        for page in found:
            self.pool.share(page)
        missing = self.pool.needed(s.prefill_end) - len(found)
        if missing + len(others) > self.pool.available:
            self.pool.give_back(found)
            return False
        s.pages = found + self.pool.take(missing, found[-1] if found else None)
        s.computed = len(found) * size
        s.listed = len(found)
        s.metrics.cached += s.computed
        return True

    def reserve(self, s: Sequence, positions: int) -> bool:
        """Pages for the first `positions` positions; False, with nothing changed, when there are too few."""
        missing = self.pool.needed(positions) - len(s.pages)
        if missing > self.pool.available:
            return False
        if missing > 0:
            s.pages += self.pool.take(missing, s.pages[-1] if s.pages else None)
        return True

    def settle(self, s: Sequence) -> None:
        """After a step whose logits were finite: returns the pages of rejected tokens, publishes those that are whole.

        Nothing is published before that: keys that are not finite must not be found by others.
        """
        size = self.pool.size
        used = self.pool.needed(max(s.computed, s.prefill_end if not s.prefilled else 0))
        self.pool.give_back(s.pages[used:])
        del s.pages[used:]
        if self.keep:
            # A text that stopped inside its block has fewer tokens than were computed.
            whole = min(s.computed, len(s.tokens)) // size
            for i in range(s.listed, whole):
                self.pool.publish(s.pages[i], self._key(s, i))
            s.listed = max(s.listed, whole)

    def shows(self, s: Sequence, start: int | None) -> bool:
        """Whether one of a request's pages that others may find reaches beyond position `start` (None: beyond all)."""
        return start is not None and s.listed * self.pool.size > start

    def release(self, s: Sequence) -> None:
        """Lets go of everything a request holds."""
        self.pool.give_back(s.pages)
        s.pages, s.computed, s.listed = [], 0, 0

    def _comes(self, s: Sequence, page: int, tag: Tag, others: list[Sequence]) -> bool:
        """Whether one of the others will publish the page that a request lacks when its own prompt is read.

        Whoever is waited for holds all pages of its prompt, and so gets to its end or gives them up: either ends this.
        """
        size, end = self.pool.size, (page + 1) * self.pool.size
        key, wanted = self._key(s, page), _wanted(s, end, tag)
        for other in others:
            # The tag of a prompt's very end may need its next token, which isn't known.
            if not other.listed <= page < other.prefill_end // size or end >= len(other.tokens):
                continue
            if self._key(other, page) == key and (wanted is None or tag(other, end) == wanted):
                return True
        return False

    def _key(self, s: Sequence, page: int) -> bytes:
        size = self.pool.size
        while len(s.keys) <= page:
            start = len(s.keys) * size
            s.keys.append(chain_key(s.keys[-1] if s.keys else b"", s.tokens[start : start + size]))
        return s.keys[page]


def _wanted(s: Sequence, end: int, tag: Tag) -> Hashable | None:
    """The tag that a page for a request must bear: any (None) where no draft is to come, as its limit only falls."""
    return tag(s, end) if s.draft_limit > 0 else None
