"""Token rows through the frozen target: features out. No Ray here.

Letters: B rows of a batch, S longest row, L taps, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from pipeline.corpus.rows import TokenRow
from pipeline.features.store import FeatureRow
from pipeline.target import TapCapture, Target


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


@torch.inference_mode()
def features_of(
    target: Target, rows: Sequence[TokenRow], layer_ids: list[int], batch_tokens: int
) -> list[FeatureRow | None]:
    """Features of rows, in their order; None where they are not finite.

    Rows are padded on the right: under causal attention a real position never sees padding behind it.
    """
    out: list[FeatureRow | None] = [None] * len(rows)
    for batch in batches(rows, batch_tokens):
        longest = max(len(rows[i].input_ids) for i in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        for b, i in enumerate(batch):
            ids[b, : len(rows[i].input_ids)] = torch.as_tensor(rows[i].input_ids)
        with TapCapture(target.family, layer_ids) as capture:
            hidden = target.family.backbone(ids.to(target.device), use_cache=False).last_hidden_state
        taps = capture.taps()
        for b, i in enumerate(batch):
            n = len(rows[i].input_ids)
            mine = taps[b, :n].to("cpu", torch.bfloat16)
            last = hidden[b, :n].to("cpu", torch.bfloat16)
            if bool(mine.isfinite().all()) and bool(last.isfinite().all()):
                mask = torch.as_tensor(rows[i].loss_mask).bool()
                out[i] = FeatureRow(rows[i].sample_id, ids[b, :n].clone(), mask, mine.clone(), last.clone())
    return out
