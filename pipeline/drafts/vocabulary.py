"""The draft vocabulary: the target tokens that the draft can propose."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from pipeline.errors import DraftlineError


def choose_vocabulary(counts: torch.Tensor, size: int, keep: Iterable[int], rows: int) -> torch.Tensor:
    """The `size` most frequent tokens of the corpus, as ascending target ids int64[Vd].

    Args:
        counts: int64[<= rows], occurrences as a label. Ties: lowest id first.
        size: Vd; 0 takes the whole vocabulary of `rows` tokens.
        keep: ids that must be in (the end-of-turn tokens).
    Raises:
        DraftlineError: size or an id does not fit the target's vocabulary.
    """
    kept = sorted(set(keep))
    if any(not 0 <= i < rows for i in kept):
        raise DraftlineError(f"Tokens {kept} must be in the draft vocabulary, but the target has {rows} tokens.")
    if size == 0 or size == rows:
        return torch.arange(rows)
    if size > rows or size < len(kept):
        raise DraftlineError(f"draft.draft_vocab_size={size} must be from {len(kept)} to the target's {rows} tokens.")
    full = torch.zeros(rows, dtype=torch.int64)
    full[: counts.shape[0]] = counts[:rows]
    full[torch.tensor(kept, dtype=torch.int64)] = int(full.max()) + 1
    return full.sort(descending=True, stable=True).indices[:size].sort().values
