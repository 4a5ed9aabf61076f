"""What training starts from: a draft with the vocabulary of its corpus and the warm starts of its config."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pipeline.config import TrainerConfig
from pipeline.corpus.build import count_bigrams, read_token_counts
from pipeline.drafts.base import Draft
from pipeline.drafts.checkpoint import load_draft, make_draft
from pipeline.drafts.config import DraftConfig, resolve
from pipeline.drafts.dspark import DSparkDraft
from pipeline.drafts.eagle3 import Eagle3Draft
from pipeline.drafts.recurrence import PairSamples, layer_from_pairs
from pipeline.drafts.regression import Samples, check_closed_form, closed_form, fewest, layers_from_features
from pipeline.drafts.vocabulary import choose_vocabulary
from pipeline.drafts.warm_start import check_copies, from_former, layers_from_target, markov_from_bigrams
from pipeline.errors import ConfigError
from pipeline.target import Target
from pipeline.training.anchors import candidates
from pipeline.training.step import Row


class Rows(Protocol):
    """Feature rows that can be counted (a FeatureStore, a list)."""

    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[Row]: ...


def build_draft(
    config: DraftConfig,
    trainer: TrainerConfig,
    target: Target,
    corpus_dir: Path,
    features: Rows,
    former: Path | None = None,
) -> Draft:
    """A new draft: `blank_draft` with its `warm_start`, of a target that is there whole."""
    draft = blank_draft(config, trainer, target, corpus_dir)
    warm_start(draft, trainer, target, corpus_dir, features, former, whole=lambda: target)
    return draft


def blank_draft(config: DraftConfig, trainer: TrainerConfig, target: Target, corpus_dir: Path) -> Draft:
    """A new draft with the vocabulary of its corpus, everything else from the seed. The target's layers are not asked
    for (`load_borrowed`)."""
    masks = config.algorithm != "eagle3" and config.mask_token_id < 0
    full = resolve(config, target.config, target.unused_token if masks else 0)
    counts = torch.from_numpy(read_token_counts(corpus_dir))
    d2t = choose_vocabulary(counts, full.draft_vocab_size, target.eos_ids, target.vocab_size)
    with torch.random.fork_rng():
        torch.manual_seed(trainer.seed)
        return make_draft(full, target, d2t)


def warm_start(
    draft: Draft,
    trainer: TrainerConfig,
    target: Target,
    corpus_dir: Path,
    features: Rows,
    former: Path | None = None,
    *,
    whole: Callable[[], Target],
) -> None:
    """Gives a blank draft, still on CPU, what it can know before its first step, as configured.

    Args:
        features: rows for `warm_start.layers=features` (and `auto`, which takes that start where it can be had, and
            the target's layers elsewhere, if a draft's are of their kind); empty where none are stored.
        former: a draft artifact whose weights replace those where they fit (see `from_former`).
        whole: loads the target with its layers; called where they are copied.
    Raises:
        ConfigError: a draft or features that `warm_start.layers=features` has no closed form for; a target whose
            layers `warm_start.layers=target` can't copy; a former draft that has nothing to give.
        ArtifactError: a former draft that is damaged or of another target.
    """
    start = trainer.warm_start.layers
    found: Samples | PairSamples | None = None
    if start == "features":
        check_closed_form(draft.config)
    if start == "features" or (start == "auto" and len(features) and closed_form(draft.config) is None):
        found = (pair_samples if draft.config.algorithm == "eagle3" else samples)(features, trainer.seed)
    if start == "auto":
        plain = target.family.layer_obstacle is None
        enough = found is not None and len(found.tokens) >= fewest(draft.config)
        start = "features" if enough else "target" if plain else "none"
    if start == "target":
        assert isinstance(draft, DSparkDraft | Eagle3Draft)
        check_copies(draft, target.family)  # before the layers are read
        layers_from_target(draft, whole().family)
    elif isinstance(found, PairSamples):
        assert isinstance(draft, Eagle3Draft)
        layer_from_pairs(draft, target.family.final_norm_gain.float(), found)
    elif found is not None:
        layers_from_features(draft, target.family, found)
    if trainer.warm_start.markov and draft.config.has_markov:
        markov_from_bigrams(draft, tuple(map(torch.from_numpy, count_bigrams(corpus_dir))), seed=trainer.seed)
    lacking = from_former(draft, load_draft(former, target)) if former is not None else []
    if lacking:
        print(f"train: the former draft gives no {', '.join(lacking)}; they start as without it", flush=True)


def share(draft: Draft) -> None:
    """Gives every rank the draft of rank 0, bit for bit; every rank calls it, with its draft where its backend sends
    from."""
    import torch.distributed as dist

    for tensor in draft.trainable_state().values():
        dist.broadcast(tensor, src=0)


def samples(rows: Iterable[Row], seed: int, most: int = 40_000) -> Samples:
    """Anchors with what a block drafter sees before them (see `_anchors`)."""
    taps, tokens, hidden = [], [], []
    for row, anchors in _anchors(rows, seed, most, 1):
        taps.append(row.taps[anchors - 1])
        tokens.append(row.input_ids[anchors].long())
        hidden.append(row.last_hidden[anchors])
    return Samples(torch.cat(taps), torch.cat(tokens), torch.cat(hidden))


def pair_samples(rows: Iterable[Row], seed: int, most: int = 40_000) -> PairSamples:
    """Anchors with what Eagle3 sees before them and one token earlier (see `_anchors`)."""
    parts: list[tuple[Tensor, ...]] = []
    for row, anchors in _anchors(rows, seed, most, 2):
        ids = row.input_ids.long()
        taps = row.taps[anchors - 1], row.taps[anchors - 2]
        parts.append((taps[0], ids[anchors], row.last_hidden[anchors], taps[1], ids[anchors - 1]))
    return PairSamples(*(torch.cat(p) for p in zip(*parts, strict=True)))


def _anchors(rows: Iterable[Row], seed: int, most: int, first: int) -> Iterator[tuple[Row, Tensor]]:
    """Rows with anchors from position `first` on, as many as `most` samples take (48 of each row, at most).

    Raises ConfigError if there are none.
    """
    generator, found = torch.Generator().manual_seed(seed), 0
    for row in rows:
        anchors = candidates(row.loss_mask)
        anchors = anchors[anchors >= first]
        anchors = anchors[torch.randperm(len(anchors), generator=generator)[:48]]
        found += len(anchors)
        yield row, anchors
        if found >= most:
            break
    if not found:
        raise ConfigError(
            "trainer.warm_start.layers=features found no answer of two tokens or more in the stored features. Use "
            "trainer.warm_start.layers=target."
        )
