"""What a draft starts from is the same whoever computes it, from as little of the target as it takes."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pipeline.config import TargetConfig, TrainerConfig, WarmStartConfig
from pipeline.drafts.base import Draft
from pipeline.drafts.config import DraftConfig
from pipeline.errors import ConfigError
from pipeline.features.store import FeatureStore
from pipeline.target import Target, load_borrowed, load_target
from pipeline.training.start import blank_draft, build_draft, share, warm_start
from tests.training.runs import LAYERS, Place, make_place

TINY = TargetConfig(path="tiny")
DRAFT = DraftConfig(
    num_layers=1, block_size=3, target_layer_ids=LAYERS, markov_rank=8, draft_vocab_size=128, qk_norm=False
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("start"))


def _same(one: Draft, other: Draft) -> bool:
    mine, theirs = one.trainable_state(), other.trainable_state()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)


@pytest.mark.parametrize(("layers", "whole_loads"), [("target", 1), ("auto", 0), ("features", 0), ("none", 0)])
def test_borrowed_matrices_give_the_draft_of_the_whole_target_bit_for_bit(
    place: Place, layers: str, whole_loads: int
) -> None:
    config = TrainerConfig(warm_start=WarmStartConfig(layers=layers))
    features = FeatureStore(place.features)
    wanted = build_draft(DRAFT, config, load_target(TINY, place.cache), place.corpus, features)
    loads: list[Target] = []

    def whole() -> Target:
        loads.append(load_target(TINY, place.cache))
        return loads[-1]

    borrowed = load_borrowed(TINY, place.cache)
    draft = blank_draft(DRAFT, config, borrowed, place.corpus)
    warm_start(draft, config, borrowed, place.corpus, features, whole=whole)
    assert len(loads) == whole_loads
    assert _same(draft, wanted)
    assert torch.equal(draft.embed, wanted.embed) and torch.equal(draft.lm_rows, wanted.lm_rows)


def test_layers_that_cannot_be_copied_are_refused_before_the_target_is_read(place: Place) -> None:
    config = TrainerConfig(warm_start=WarmStartConfig(layers="target"))
    borrowed = load_borrowed(TINY, place.cache)
    draft = blank_draft(DraftConfig(target_layer_ids=LAYERS, num_layers=5), config, borrowed, place.corpus)

    def whole() -> Target:
        raise AssertionError("read in vain")

    with pytest.raises(ConfigError, match="draft.num_layers=5, but the target has 4 layers"):
        warm_start(draft, config, borrowed, place.corpus, [], whole=whole)


@contextlib.contextmanager
def _group(rank: int, folder: str) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    yield
    dist.destroy_process_group()


def _rank(rank: int, folder: str, cache: str, corpus: str) -> None:
    config = TrainerConfig(warm_start=WarmStartConfig(layers="target"))
    target = load_borrowed(TINY, Path(cache))
    draft = blank_draft(DRAFT, config, target, Path(corpus))
    if rank == 0:
        warm_start(draft, config, target, Path(corpus), [], whole=lambda: load_target(TINY, Path(cache)))
    before = {n: t.clone() for n, t in draft.trainable_state().items()}
    with _group(rank, folder):
        share(draft)
    torch.save({"before": before, "after": draft.trainable_state()}, f"{folder}/rank-{rank}.pt")


def test_what_rank_0_computes_reaches_the_others_bit_for_bit(place: Place, tmp_path: Path) -> None:
    mp.spawn(_rank, (str(tmp_path), str(place.cache), str(place.corpus)), nprocs=2)
    first, second = (torch.load(tmp_path / f"rank-{r}.pt") for r in (0, 1))
    for name, weight in first["before"].items():
        assert torch.equal(first["after"][name], weight), name
        assert torch.equal(second["after"][name], weight), name
    assert not torch.equal(second["before"]["fc.weight"], first["before"]["fc.weight"])
    assert not torch.equal(
        second["before"]["markov_head.markov_w1.weight"], first["before"]["markov_head.markov_w1.weight"]
    )


@pytest.mark.parametrize("algorithm", ["dspark", "eagle3"])
def test_auto_takes_the_targets_layers_where_features_are_too_few(place: Place, algorithm: str) -> None:
    """Features that are asked for by name are refused there, and so is a draft that they have no closed form for."""
    plain = {"markov_head_type": "none", "enable_confidence_head": False, "markov_rank": 0}
    draft = dataclasses.replace(DRAFT, algorithm=algorithm, **(plain if algorithm == "eagle3" else {}))
    target, few = load_target(TINY, place.cache), [FeatureStore(place.features)[0]]

    def made(layers: str, draft: DraftConfig = draft) -> Draft:
        return build_draft(draft, TrainerConfig(warm_start=WarmStartConfig(layers=layers)), target, place.corpus, few)

    assert _same(made("auto"), made("target"))
    with pytest.raises(ConfigError, match=r"samples; it takes a\s+quarter"):
        made("features")
    with pytest.raises(ConfigError, match="qk_norm"):
        made("features", dataclasses.replace(draft, qk_norm=True))
