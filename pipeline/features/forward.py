"""Token rows through the frozen target: features out. No Ray here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.nn.utils.rnn import pad_sequence

from pipeline.corpus.rows import TokenRow
from pipeline.features.store import FeatureRow
from pipeline.target import Target, features_of


def batches(rows: Sequence[TokenRow], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of rows that run together: of similar length, at most `batch_tokens` padded tokens (one row at least)."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids), reverse=True)
    batch: list[int] = []
    for i in order:
        longest = len(rows[batch[0]].input_ids) if batch else len(rows[i].input_ids)
        if batch and (len(batch) + 1) * longest > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def feature_rows(
    target: Target, rows: Sequence[TokenRow], layer_ids: list[int], batch_tokens: int
) -> list[FeatureRow | None]:
    """Features of rows, in their order; None where they are not finite."""
    out: list[FeatureRow | None] = [None] * len(rows)
    for batch in batches(rows, batch_tokens):
        ids = pad_sequence([torch.as_tensor(rows[i].input_ids).long() for i in batch], batch_first=True)
        lengths = [len(rows[i].input_ids) for i in batch]
        for b, (i, taps, hidden) in enumerate(zip(batch, *features_of(target, layer_ids, ids, lengths), strict=True)):
            mine, last = (t.to("cpu", torch.bfloat16, copy=True) for t in (taps, hidden))
            if bool(mine.isfinite().all()) and bool(last.isfinite().all()):
                mask = torch.as_tensor(rows[i].loss_mask).bool()
                out[i] = FeatureRow(rows[i].sample_id, ids[b, : lengths[b]].clone(), mask, mine, last)
    return out
