"""What training reads from the store is what the target computed, row for row."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from pipeline.artifact import load
from pipeline.config import TargetConfig
from pipeline.corpus.build import read_rows
from pipeline.drafts.config import default_layer_ids
from pipeline.errors import ArtifactError, ConfigError, DraftlineError
from pipeline.features.extract import Extractor, extract, with_layers
from pipeline.features.forward import batches, feature_rows
from pipeline.features.store import FeatureStore, shard_name
from pipeline.features.stream import StreamExtractor, feature_stream
from pipeline.target import load_target, obtain
from tests.features.conftest import FEATURES, TARGET

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def store(ray_here, corpus_dir: Path, cache_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    out = tmp_path_factory.mktemp("out") / "features"
    extract(FEATURES, TARGET, corpus_dir, out, cache_dir)
    return FeatureStore(out)


def test_the_store_holds_every_training_row_once_in_the_order_of_the_corpus(store, corpus_dir) -> None:
    rows = read_rows(corpus_dir, "train")
    assert [store[i].sample_id for i in range(store.rows)] == [r.sample_id for r in rows]
    for i, row in enumerate(rows):
        assert store[i].input_ids.tolist() == row.input_ids.tolist()
        assert store[i].loss_mask.tolist() == row.loss_mask.tolist()
        assert (store[i].input_ids.dtype, store[i].loss_mask.dtype) == (torch.int64, torch.bool)
    counts = store.manifest.counts
    assert counts["rows"] == len(rows) == 26 and counts["shards"] == 7 and counts["not_finite"] == 0
    assert counts["tokens"] == sum(len(r.input_ids) for r in rows)
    assert store.manifest.info["target_layer_ids"] == [0, 2] and store.manifest.info["hidden_size"] == 64
    with pytest.raises(IndexError):
        store[store.rows]


def test_features_are_those_of_plain_transformers_on_the_row_alone(store, cache_dir) -> None:
    target = load_target(TARGET, cache_dir)
    for i in range(store.rows):
        row = store[i]
        with torch.no_grad():
            out = target.model.model(row.input_ids[None], output_hidden_states=True, use_cache=False)
        taps = torch.cat([out.hidden_states[layer + 1][0] for layer in FEATURES.target_layer_ids], dim=-1)
        assert row.taps.dtype == row.last_hidden.dtype == torch.bfloat16
        # One bf16 rounding (2^-9) of what a batched matmul computes in another order.
        torch.testing.assert_close(row.taps.float(), taps, rtol=2**-8, atol=1e-4)
        torch.testing.assert_close(row.last_hidden.float(), out.last_hidden_state[0], rtol=2**-8, atol=1e-4)


def test_the_stream_gives_the_rows_of_the_store_bit_for_bit(store, corpus_dir, cache_dir) -> None:
    stream = feature_stream(dataclasses.replace(FEATURES, actors=2), TARGET, corpus_dir, cache_dir)
    try:
        assert stream.rows == store.rows
        size = FEATURES.shard_rows  # rows that were extracted together are asked for together: the same sums
        wanted = [list(range(start, min(start + size, store.rows))) for start in range(0, store.rows, size)]
        orders = [stream.ask(number, rows) for number, rows in enumerate(wanted)]
        streamed = [row for order in orders for row in stream.get(order)]
    finally:
        for actor in stream.actors:
            ray.kill(actor)
    for i, sent in enumerate(streamed):
        assert sent is not None and sent.sample_id == store[i].sample_id, "in the order asked for"
        for name in ("input_ids", "loss_mask", "taps", "last_hidden"):
            a, b = getattr(store[i], name), getattr(sent, name)
            assert a.dtype == b.dtype and torch.equal(a, b), name


def test_an_actor_neither_hashes_nor_parses_the_corpus_to_make_its_shard(
    store, corpus_dir, cache_dir, tmp_path, monkeypatch
) -> None:
    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("the whole split was read")

    monkeypatch.setattr("pipeline.artifact.sha256_file", refuse)
    monkeypatch.setattr("pyarrow.parquet.read_table", refuse)
    actor = Extractor(FEATURES, TARGET, str(corpus_dir), "train", str(tmp_path), str(cache_dir))
    actor({"shard": np.array([6])})
    assert (tmp_path / shard_name(6)).read_bytes() == (store.path / shard_name(6)).read_bytes()
    streaming = StreamExtractor(FEATURES, TARGET, str(corpus_dir), "train", str(cache_dir))
    given = streaming.features([25, 3])
    assert [row and row["sample_id"] for row in given] == [store[25].sample_id, store[3].sample_id]


def test_an_altered_corpus_is_refused_before_anything_streams(corpus_dir, cache_dir, tmp_path) -> None:
    shutil.copytree(corpus_dir, tmp_path / "corpus")
    file = tmp_path / "corpus" / "rows-train.parquet"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match="rows-train.parquet was altered"):
        feature_stream(FEATURES, TARGET, tmp_path / "corpus", cache_dir)


@pytest.mark.fault
def test_a_stream_whose_actor_dies_gives_what_was_asked_for(store, corpus_dir, cache_dir) -> None:
    stream = feature_stream(FEATURES, TARGET, corpus_dir, cache_dir)
    try:
        (actor,) = stream.actors
        stream.get(stream.ask(0, [0]))
        order = stream.ask(1, [5, 2])
        ray.kill(actor, no_restart=False)
        again = stream.ask(2, [7])
        got = [r.sample_id for o in (order, again) for r in stream.get(o) if r is not None]
    finally:
        for actor in stream.actors:
            ray.kill(actor)
    assert got == [store[i].sample_id for i in (5, 2, 7)]


def test_features_that_are_current_are_not_made_again(store, corpus_dir, cache_dir) -> None:
    before = {f.name: f.stat().st_mtime_ns for f in store.path.iterdir()}
    again = extract(dataclasses.replace(FEATURES, threads=2), TARGET, corpus_dir, store.path, cache_dir)
    assert again.digest == store.manifest.digest
    assert {f.name: f.stat().st_mtime_ns for f in store.path.iterdir()} == before


def test_a_corpus_of_another_target_is_refused_before_anything_runs(corpus_dir, cache_dir, tmp_path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    target = load_target(TARGET, cache_dir)
    target.model.save_pretrained(folder)
    target.tokenizer.save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": 0.5}))
    with pytest.raises(ArtifactError, match="belongs to another target: its config is "):
        extract(FEATURES, TargetConfig(path=str(folder)), corpus_dir, tmp_path / "features", cache_dir)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_layer_ids": [4]}, "To tap the last layer's raw output, use 3"),
        ({"dtype": "float16"}, "features.dtype='float16'"),
        ({"compute_dtype": "int8"}, "features.compute_dtype='int8'"),
        ({"shard_rows": 0}, "features.shard_rows=0"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_their_name(corpus_dir, cache_dir, tmp_path, change, message) -> None:
    config = dataclasses.replace(FEATURES, **change)
    for run in (
        lambda: extract(config, TARGET, corpus_dir, tmp_path / "f", cache_dir),
        lambda: feature_stream(config, TARGET, corpus_dir, cache_dir),
    ):
        with pytest.raises(ConfigError, match=message):
            run()


def test_layers_that_nobody_names_are_the_drafts_default(corpus_dir, cache_dir) -> None:
    named = with_layers(dataclasses.replace(FEATURES, target_layer_ids=[]), TARGET, cache_dir)
    assert named.target_layer_ids == default_layer_ids(4)
    assert with_layers(FEATURES, TARGET, cache_dir) is FEATURES


def test_a_target_of_a_kind_that_transformers_does_not_know_is_one_error(corpus_dir, cache_dir, tmp_path) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(obtain(TARGET, cache_dir), folder)
    (folder / "config.json").write_text('{"model_type": "of-tomorrow"}')
    config, target = dataclasses.replace(FEATURES, target_layer_ids=[]), TargetConfig(path=str(folder))
    for run in (
        lambda: extract(config, target, corpus_dir, tmp_path / "f", cache_dir),
        lambda: feature_stream(config, target, corpus_dir, cache_dir),
    ):
        with pytest.raises(DraftlineError, match="not a model that transformers can load: .*of-tomorrow"):
            run()


def test_an_empty_split_is_refused(corpus_dir, cache_dir, tmp_path) -> None:
    with pytest.raises(DraftlineError, match="has no heldout rows"):
        extract(FEATURES, TARGET, corpus_dir, tmp_path / "f", cache_dir, split="heldout")


def test_batches_hold_every_row_once_within_the_limit_unless_a_row_alone_exceeds_it(corpus_dir) -> None:
    rows = read_rows(corpus_dir, "train")
    lengths = [len(r.input_ids) for r in rows]
    for limit in (1, max(lengths), 3 * max(lengths), 10**6):
        planned = list(batches(rows, limit))
        assert sorted(i for b in planned for i in b) == list(range(len(rows)))
        assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= limit for b in planned)
    assert len(list(batches(rows, 10**6))) == 1


def test_a_row_whose_features_are_not_finite_is_left_out_alone(corpus_dir, cache_dir) -> None:
    rows = read_rows(corpus_dir, "train")[:6]
    target = load_target(TARGET, cache_dir)
    # Only the first token of each word list differs; break the embedding of one that row 3 alone holds.
    others = {int(t) for i, r in enumerate(rows) if i != 3 for t in r.input_ids}
    own = next(int(t) for t in rows[3].input_ids if int(t) not in others)
    with torch.no_grad():
        target.family.embed_tokens.weight[own] = float("nan")
    made = feature_rows(target, rows, [0, 2], 512)
    assert [m is None for m in made] == [i == 3 for i in range(6)]
    whole = feature_rows(load_target(TARGET, cache_dir), rows, [0, 2], 512)
    assert all(torch.equal(made[i].taps, whole[i].taps) for i in range(6) if i != 3)


def test_the_artifact_passes_its_own_check(store) -> None:
    assert load(store.path, "features").counts == store.manifest.counts


class Mistaken(Extractor):
    """Finds at its first shard what only the user can mend."""

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        raise ConfigError("features.batch_tokens=1 is not enough.")


def test_a_mistake_that_an_actor_finds_is_what_it_says(
    ray_here, corpus_dir, cache_dir, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.features.extract.Extractor", Mistaken)
    with pytest.raises(DraftlineError, match=r"^features.batch_tokens=1 is not enough\.$"):
        extract(FEATURES, TARGET, corpus_dir, tmp_path / "f", cache_dir)
