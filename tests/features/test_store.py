"""A shard that is not what was written is refused, never read as data; so is another target's store."""

from __future__ import annotations

import pickle
import threading
from pathlib import Path

import pytest
import torch

from pipeline import artifact
from pipeline.errors import ArtifactError
from pipeline.features.store import FeatureRow, FeatureStore, check_identity, shard_name, write_shard

WIDTH, HIDDEN = 6, 3
IDENTITY = {
    "id": "a",
    "revision": "1",
    "weight_digest": "w" * 64,
    "config_digest": "c" * 64,
    "tokenizer_digest": "t" * 64,
}


def row(name: str, tokens: int) -> FeatureRow:
    generator = torch.Generator().manual_seed(tokens)
    return FeatureRow(
        name,
        torch.arange(tokens),
        torch.arange(tokens) % 2 == 0,
        torch.randn(tokens, WIDTH, generator=generator).bfloat16(),
        torch.randn(tokens, HIDDEN, generator=generator).bfloat16(),
    )


ROWS = [row("a", 5), row("b", 1), row("c", 7)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Three shards: two rows, none, one."""
    shards = [ROWS[:2], [], ROWS[2:]]
    with artifact.create(tmp_path / "features", "features", config={}, target=IDENTITY) as staging:
        for n, rows in enumerate(shards):
            write_shard(staging.path / shard_name(n), rows, WIDTH, HIDDEN)
        staging.info["shards"] = [{"name": shard_name(n), "rows": len(r), "tokens": 0} for n, r in enumerate(shards)]
    return tmp_path / "features"


def assert_same(a: FeatureRow, b: FeatureRow) -> None:
    assert a.sample_id == b.sample_id
    for name in ("input_ids", "loss_mask", "taps", "last_hidden"):
        x, y = getattr(a, name), getattr(b, name)
        assert x.dtype == y.dtype and torch.equal(x, y), name


def test_rows_come_back_bit_for_bit_in_any_order_across_shards_with_and_without_rows(path) -> None:
    store = FeatureStore(path)
    assert store.rows == len(store) == 3
    for i in (2, 0, 1, 2):
        assert_same(store[i], ROWS[i])
    for outside in (-1, 3):
        with pytest.raises(IndexError):
            store[outside]


def test_a_store_travels_to_another_process_after_it_was_read(path) -> None:
    store = FeatureStore(path)
    store.expect([0])
    assert_same(store[2], ROWS[2])
    assert_same(pickle.loads(pickle.dumps(store))[2], ROWS[2])


def test_one_altered_byte_is_found_at_the_shards_first_row_and_other_shards_still_read(path) -> None:
    file = path / shard_name(2)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    store = FeatureStore(path)
    assert_same(store[0], ROWS[0])
    with pytest.raises(ArtifactError, match=rf"{shard_name(2)} was altered.*run jobs/extract.py again"):
        store[2]


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Every file that is hashed, and whether by the thread that reads."""
    done: list[tuple[str, bool]] = []
    original = artifact.sha256_file

    def noted(file: Path) -> str:
        done.append((file.name, threading.current_thread() is threading.main_thread()))
        return original(file)

    monkeypatch.setattr("pipeline.artifact.sha256_file", noted)
    return done


def test_expected_shards_are_hashed_once_and_not_by_the_reader(path, hashed) -> None:
    store = FeatureStore(path)
    assert store.expect([2]) is True
    assert store.expect([1, 2]) is False, "the shard without rows is nobody's to ask for"
    assert store.expect([0, 2]) is False
    for i in (2, 0, 1, 2):
        assert_same(store[i], ROWS[i])
    assert sorted(hashed) == [(shard_name(0), False), (shard_name(2), False)]


def test_a_damaged_shard_that_was_expected_is_said_where_its_row_is_read(path) -> None:
    file = path / shard_name(2)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    store = FeatureStore(path)
    store.expect(range(3))
    assert_same(store[1], ROWS[1])
    for _ in range(2):
        with pytest.raises(ArtifactError, match=rf"{shard_name(2)} was altered.*run jobs/extract.py again"):
            store[2]


def test_a_truncated_or_missing_shard_is_found_on_opening(path) -> None:
    file = path / shard_name(0)
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(ArtifactError, match=f"{shard_name(0)} is truncated"):
        FeatureStore(path)
    file.unlink()
    with pytest.raises(ArtifactError, match=f"{shard_name(0)} is missing"):
        FeatureStore(path)


def test_a_shard_is_whole_or_not_there(tmp_path, monkeypatch) -> None:
    def interrupted(_tensors, file, **_kwargs) -> None:
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("pipeline.features.store.save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_shard(tmp_path / shard_name(0), ROWS, WIDTH, HIDDEN)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("revision", "revision"),
        ("weight_digest", "weights"),
        ("config_digest", "config"),
        ("tokenizer_digest", "tokenizer"),
    ],
)
def test_a_store_of_another_target_is_refused_naming_what_differs(path, field: str, name: str) -> None:
    manifest = FeatureStore(path).manifest
    check_identity(manifest, {**IDENTITY, "id": "where it lies now"}, path)
    with pytest.raises(ArtifactError, match=rf"its {name} is .*Set target.path and target.revision"):
        check_identity(manifest, {**IDENTITY, field: "x" * 64}, path)
