"""Which page of the KV pool belongs to whom, what is kept for later prompts, and where the next one comes from.

A page is `size` consecutive cells of every keys-and-values tensor, the target's and the drafts' alike: this file only
knows ids. A page is held by one request or more, kept (nobody's, but whole and of a known text, until the space is
needed; longest unused goes first), or free. A page that changes hands isn't cleaned: whoever holds it heeds only cells
that it wrote, or that were whole when it was found. The exception are values that may not be finite (PagedKV.wipe).

A kept page is found by the chain hash of all tokens up to its end. That says what the target's keys are; a draft's are
there too if the page bears that draft's tag.
"""

from __future__ import annotations

import collections
import hashlib
from collections.abc import Hashable, Iterable, Sequence

import numpy as np


def chain_key(before: bytes, tokens: Sequence[int]) -> bytes:
    """Key of a page by its tokens and by the key of the page before it (b"" for the first)."""
    return hashlib.blake2b(before + np.asarray(tokens, dtype=np.int64).tobytes(), digest_size=16).digest()


class PagePool:
    """Hands out pages 0..pages-1 of `size` cells and refuses double use.

    Args:
        scratch: whether the tensors have one page more, which is never handed out: what a step writes for nobody goes
            there (pipeline/decoding/recorded.py).
    Attributes:
        refs: int64[pages], how many requests hold each. total: pages of the tensors.
    """

    def __init__(self, pages: int, size: int, *, scratch: bool = False) -> None:
        self.pages, self.size, self.total = pages, size, pages + scratch
        self.refs = np.zeros(pages, dtype=np.int64)
        self._free = np.ones(pages, dtype=bool)
        self._free_count = pages
        self._kept: collections.OrderedDict[int, None] = collections.OrderedDict()
        self._key: dict[int, bytes] = {}
        self._listed: dict[bytes, list[int]] = {}
        self._tags: dict[int, set[Hashable]] = {}

    @property
    def available(self) -> int:
        """Pages that `take` can give."""
        return self._free_count + len(self._kept)

    @property
    def kept(self) -> int:
        """Pages that nobody holds and a later prompt may find."""
        return len(self._kept)

    def needed(self, positions: int) -> int:
        """Pages that hold so many positions."""
        return -(-positions // self.size)

    # -- holding ------------------------------------------------------------------------------------------------------

    def take(self, count: int, after: int | None = None) -> list[int]:
        """`count` pages, each held once; consecutive where that is possible, as one run is attended to without a copy.

        Args:
            after: the page that they continue.
        Raises:
            RuntimeError: fewer are available.
        """
        if count > self.available:
            raise RuntimeError(f"{count} pages wanted, {self.available} available")
        if count > self._free_count:
            # More than needed, as pages that were kept together are next to each other.
            self._evict(max(count - self._free_count, min(len(self._kept), self.pages // 16)))
        taken: list[int] = []
        at = self.pages if after is None else after + 1
        while len(taken) < count:
            if at >= self.pages or not self._free[at]:
                at = self._gap(count - len(taken))
            self._free[at] = False
            taken.append(at)
            at += 1
        self._free_count -= count
        self.refs[taken] = 1
        return taken

    def share(self, page: int) -> None:
        """Holds a page that was found once more."""
        if self.refs[page] == 0:
            del self._kept[page]
        self.refs[page] += 1

    def give_back(self, pages: Iterable[int]) -> None:
        """Lets go of pages held once each by the caller, in the order of their text. Those that nobody else holds are
        kept if they were published, the end of a text to go first."""
        for page in reversed(list(pages)):
            if self.refs[page] < 1:
                raise AssertionError(f"page {page} returned but not held")
            self.refs[page] -= 1
            if self.refs[page] == 0:
                if page in self._key and not self._redundant(page):
                    self._kept[page] = None
                else:
                    self._clear(page)

    # -- finding ------------------------------------------------------------------------------------------------------

    def publish(self, page: int, key: bytes) -> None:
        """Lets later prompts find a held page: all its cells are written, of the text that `key` stands for."""
        assert self.refs[page] > 0 and page not in self._key
        self._key[page] = key
        self._listed.setdefault(key, []).append(page)

    def mark(self, page: int, tag: Hashable) -> None:
        """Says that a held page has a draft's keys and values too, of the text and draft that `tag` stands for."""
        assert self.refs[page] > 0
        self._tags.setdefault(page, set()).add(tag)

    def find(self, key: bytes, tag: Hashable | None) -> int | None:
        """A published page of this text that bears the tag (None: any)."""
        for page in self._listed.get(key, ()):
            if tag is None or tag in self._tags.get(page, ()):
                return page
        return None

    def untag(self, draft: int) -> None:
        """Takes away the tags (tuples that begin with the draft's number) of a draft whose tensors go."""
        for page in list(self._tags):
            self._tags[page] = {t for t in self._tags[page] if not (isinstance(t, tuple) and t[0] == draft)}

    def forget(self) -> None:
        """Frees every kept page; held ones are no longer found."""
        self._evict(len(self._kept))
        self._key.clear()
        self._listed.clear()

    # -- inside -------------------------------------------------------------------------------------------------------

    def _redundant(self, page: int) -> bool:
        mine = self._tags.get(page, set())
        others = (p for p in self._listed[self._key[page]] if p != page)
        return any(mine <= self._tags.get(p, set()) for p in others)

    def _evict(self, count: int) -> None:
        for _ in range(count):
            page, _ = self._kept.popitem(last=False)
            self._clear(page)

    def _clear(self, page: int) -> None:
        key = self._key.pop(page, None)
        if key is not None:
            self._listed[key].remove(page)
            if not self._listed[key]:
                del self._listed[key]
        self._tags.pop(page, None)
        self._free[page] = True
        self._free_count += 1

    def _gap(self, count: int) -> int:
        """Where to start a new run: in the largest gap, in its middle where whoever ends before it may grow into it."""
        edges = np.flatnonzero(np.diff(self._free, prepend=False, append=False)).reshape(-1, 2)
        low, high = edges[np.argmax(edges[:, 1] - edges[:, 0])].tolist()
        middle = low + (high - low) // 2
        return middle if low > 0 and self.refs[low - 1] > 0 and high - middle >= count else low
