"""Several drafts at once: every request keeps the one it was admitted with, so drafts come and go between two steps.

A canary, a draft per tenant, a rollback: requests name a draft or take the default. A draft that is taken out goes on
for the requests it has, and is let go with the last of them.

Letters: B requests, K block size, V target vocabulary, Vd draft vocabulary, T rows of a step, D hidden.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping

import torch

from pipeline.decoding.cache import on_device
from pipeline.decoding.pages import PagePool
from pipeline.decoding.proposers.base import Commit, Proposal, Proposer
from pipeline.decoding.recorded import RecordingTerms
from pipeline.decoding.request import Request, RequestRefused, Sequence
from pipeline.errors import ConfigError, DraftlineError, nearest


class SeveralDrafts:
    """A proposer that hands every request to its own draft.

    Args:
        drafts: proposers by name, made for the same rule.
        default: of requests that name none.
        vocabulary: V.
    Raises:
        ConfigError: no such default, or drafts that draw for different verification rules.
    """

    name = "several"

    def __init__(self, drafts: Mapping[str, Proposer], default: str, vocabulary: int) -> None:
        self._drafts: dict[str, Proposer] = {}
        self._leaving: dict[str, Proposer] = {}
        self._pinned: dict[str, tuple[str, Proposer]] = {}
        self._vocabulary = vocabulary
        self._pool: PagePool | None = None
        self._terms: RecordingTerms | None = None
        self.default = default
        self.change(drafts, default)

    @property
    def names(self) -> list[str]:
        """Drafts that requests may ask for."""
        return list(self._drafts)

    @property
    def resident(self) -> list[Proposer]:
        """Those, and the ones that only have requests to finish."""
        return [*self._drafts.values(), *self._leaving.values()]

    @property
    def block_size(self) -> int:
        return max(p.block_size for p in self.resident)

    @property
    def rule(self) -> str | None:
        """What the drafts draw for; None if it is all the same to them."""
        return next((p.rule for p in self.resident if hasattr(p, "rule")), None)

    def change(self, add: Mapping[str, Proposer], default: str, remove: Iterable[str] = ()) -> None:
        """Takes drafts in and out (through `Engine.change_drafts`, which knows what requests are due).

        Raises:
            ConfigError: a name that is taken, is not there or would be the default and removed; another rule.
            DraftlineError: no memory for the keys of a new one.
            Either way nothing has changed.
        """
        remove = set(remove)
        after = {n: p for n, p in self._drafts.items() if n not in remove} | dict(add)
        for name in add:
            if name in self._drafts or name in self._leaving:
                raise ConfigError(f"There is a draft {name!r} already; add this one by another name.")
        for name in remove - set(self._drafts):
            raise ConfigError(f"There is no draft {name!r} to remove.{nearest(name, self.names)}")
        if default not in after:
            raise ConfigError(f"The default draft {default!r} is not one of {', '.join(after) or 'any'}.")
        rules = {p.rule for p in [*after.values(), *self.resident] if hasattr(p, "rule")}
        if len(rules) > 1:
            raise ConfigError(f"These drafts draw for different rules ({', '.join(sorted(rules))}); make all for one.")
        used = {name for name, _ in self._pinned.values()}
        if self._pool is not None:
            _attach_all(list(add.values()), self._pool, self._terms)
            for name in remove - used:
                self._drafts[name].detach(self._pool)
        self._leaving |= {n: p for n, p in self._drafts.items() if n in remove and n in used}
        self._drafts, self.default = after, default
        # Until the next change: a draft that leaves meanwhile must not move the columns of taps on their way.
        self.layer_ids = sorted({i for p in self.resident for i in p.layer_ids})

    def check(self, request: Request) -> None:
        """Raises RequestRefused where it asks for a draft that no request may ask for."""
        name = request.draft
        if name is not None and name not in self._drafts:
            hint = nearest(name, self.names)
            raise RequestRefused(f"is {name!r}; there are {', '.join(self.names)}.{hint}", request.id, "draft")

    def page_bytes(self, size: int) -> int:
        return sum(p.page_bytes(size) for p in self.resident)

    def attach(self, pool: PagePool, terms: RecordingTerms | None = None) -> None:
        _attach_all(self.resident, pool, terms)
        self._pool, self._terms = pool, terms

    def detach(self, pool: PagePool) -> None:
        for p in self.resident:
            p.detach(pool)
        if pool is self._pool:
            self._pool = None

    def wipe(self, pages: list[int]) -> None:
        for p in self.resident:
            p.wipe(pages)

    def tag(self, sequence: Sequence, end: int) -> Hashable | None:
        _, proposer = self._pinned.get(sequence.request.id) or ("", self._drafts[self._name(sequence)])
        return proposer.tag(sequence, end)

    def _name(self, sequence: Sequence) -> str:
        """Of the draft for a request: the one it had before it was preempted, or asks for; the default where that has
        gone meanwhile."""
        names = (sequence.metrics.draft, sequence.request.draft or "")
        return next((n for n in names if n in self._drafts), self.default)

    def admit(self, sequence: Sequence) -> None:
        name = self._name(sequence)
        self._pinned[sequence.request.id] = (name, self._drafts[name])
        sequence.metrics.draft = name
        self._drafts[name].admit(sequence)

    def release(self, sequence: Sequence) -> None:
        name, proposer = self._pinned.pop(sequence.request.id)
        proposer.release(sequence)
        if all(name != other for other, _ in self._pinned.values()):
            gone = self._leaving.pop(name, None)
            if gone is not None and self._pool is not None:
                gone.detach(self._pool)

    def commit(self, commits: list[Commit], taps: torch.Tensor | None) -> None:
        for proposer in self.resident:
            mine = [c for c in commits if self._pinned[c.sequence.request.id][1] is proposer]
            proposer.commit(mine, _of_layers(taps, self.layer_ids, proposer.layer_ids))

    def propose(self, sequences: list[Sequence]) -> Proposal:
        parts: list[tuple[list[int], Proposal]] = []
        for proposer in self.resident:
            rows = [i for i, s in enumerate(sequences) if self._pinned[s.request.id][1] is proposer]
            if rows:
                parts.append((rows, proposer.propose([sequences[i] for i in rows])))
        return parts[0][1] if len(parts) == 1 else _together(parts, len(sequences), self._vocabulary)


def blocks_on_device(proposer: Proposer) -> list[int]:
    """The sizes K of blocks that a step may be about before the host has seen them, rising. Proposers without a context
    propose on the host, but the blocks of a step that others share with them are as long as theirs where those are
    longer."""
    drafts = proposer.resident if isinstance(proposer, SeveralDrafts) else [proposer]
    least = min((p.block_size for p in drafts if p.layer_ids), default=None)
    return [] if least is None else sorted({p.block_size for p in drafts if p.block_size >= least})


def _attach_all(drafts: list[Proposer], pool: PagePool, terms: RecordingTerms | None) -> None:
    try:
        for p in drafts:
            p.attach(pool, terms)
    except DraftlineError:
        for p in drafts:
            p.detach(pool)
        raise


def _of_layers(taps: torch.Tensor | None, layers: list[int], wanted: list[int]) -> torch.Tensor | None:
    """The columns [T, len(wanted) * D] of taps [T, len(layers) * D]."""
    if taps is None or layers == wanted:
        return taps
    if not wanted:
        return None
    at = on_device([layers.index(i) for i in wanted], taps.device)
    return taps.unflatten(1, (len(layers), -1))[:, at].flatten(1)


def _together(parts: list[tuple[list[int], Proposal]], batch: int, vocabulary: int) -> Proposal:
    """One proposal of B requests: rows in their order, blocks filled up to the longest K, and logits, where tokens were
    drawn from some, over the whole target vocabulary (a row without any is a certain one)."""
    first = parts[0][1].tokens
    block = max(p.tokens.shape[1] for _, p in parts)
    out = Proposal(
        torch.zeros(batch, block, dtype=torch.int64, device=first.device),
        torch.zeros(batch, dtype=torch.int64),
        torch.zeros(batch, block, device=first.device),
    )
    if all(p.raw_confidence is not None for _, p in parts):
        out.raw_confidence = torch.zeros_like(out.confidence)
    if any(p.logits is not None for _, p in parts):
        out.logits = torch.full((batch, block, vocabulary), float("-inf"), device=first.device)
    for rows, p in parts:
        count = p.tokens.shape[1]
        out.tokens[rows, :count] = p.tokens.to(first.device)
        out.counts[rows] = p.counts
        out.confidence[rows, :count] = p.confidence.to(first.device)
        if out.raw_confidence is not None and p.raw_confidence is not None:
            out.raw_confidence[rows, :count] = p.raw_confidence
        if out.logits is not None and p.logits is not None:
            whole = out.logits.new_full((len(rows), count, vocabulary), float("-inf"))
            columns = torch.arange(vocabulary, device=first.device) if p.d2t is None else p.d2t
            whole[..., columns] = p.logits
            out.logits[rows, :count] = whole
    return out
