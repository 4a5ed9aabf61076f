"""Whatever is killed with SIGKILL while features are extracted, every row is in the store once and none is wrong."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from pipeline import artifact
from pipeline.corpus.build import read_rows
from pipeline.errors import DraftlineError
from pipeline.features.extract import Extractor, extract
from pipeline.features.forward import feature_rows
from pipeline.features.store import FeatureStore
from pipeline.target import load_target
from tests.features.conftest import FEATURES, TARGET
from tests.processes import below

pytestmark = [pytest.mark.ray, pytest.mark.fault, pytest.mark.timeout(600)]

# One row a shard: 26 chances to be killed between two of them.
CONFIG = dataclasses.replace(FEATURES, shard_rows=1)
WAIT_SECONDS = 240  # a driver has to start Ray and its actors, on a crowded machine perhaps
DRIVER = """
import sys, ray
from tests.features.test_faults import CONFIG, TARGET, extract
ray.init(num_cpus=4, include_dashboard=False, logging_level="warning")
extract(CONFIG, TARGET, *sys.argv[1:])
"""


def done_shards(out: Path) -> dict[str, int]:
    """Shards noted as whole in the staging directory, with the time they were written."""
    staging = out.with_name(f".{out.name}.staging")
    notes = list(staging.glob("shard-*.safetensors.json"))
    return {n.stem: n.with_suffix("").stat().st_mtime_ns for n in notes}


def wait_for(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.002)
    return False


def extractors() -> set[int]:
    """The processes of extracting actors."""
    return set(below("MapBatches(Extractor)"))


def assert_every_row_once(out: Path, corpus_dir: Path, cache_dir: Path) -> None:
    assert artifact.load(out, "features").counts["rows"] == 26
    store, rows = FeatureStore(out), read_rows(corpus_dir, "train")
    assert [store[i].sample_id for i in range(store.rows)] == [r.sample_id for r in rows]
    target = load_target(TARGET, cache_dir)
    for i, row in enumerate(rows):
        (made,) = feature_rows(target, [row], CONFIG.target_layer_ids, CONFIG.batch_tokens)
        assert made is not None
        # One bf16 rounding apart: another process may add in another order.
        torch.testing.assert_close(store[i].taps, made.taps, rtol=2**-7, atol=1e-3)
    assert not list(out.glob(".*")) and not out.with_name(f".{out.name}.staging").exists()


def test_an_actor_killed_between_shards_loses_and_repeats_nothing(ray_here, corpus_dir, cache_dir, tmp_path) -> None:
    out = tmp_path / "features"
    killed: list[tuple[int, int]] = []
    others = extractors()

    def kill() -> None:
        if not wait_for(lambda: len(done_shards(out)) >= 3):
            return
        for pid in extractors() - others:
            os.kill(pid, signal.SIGKILL)
            killed.append((pid, len(done_shards(out))))

    killer = threading.Thread(target=kill)
    killer.start()
    extract(CONFIG, TARGET, corpus_dir, out, cache_dir)
    killer.join()
    assert len(killed) == 1 and 3 <= killed[0][1] < 26
    assert_every_row_once(out, corpus_dir, cache_dir)


class Murderous(Extractor):
    """Its process dies of shard 1, every time."""

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if int(batch["shard"][0]) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(batch)


def test_a_shard_that_kills_its_actor_every_time_is_given_up(
    ray_here, corpus_dir, cache_dir, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr("pipeline.features.extract.Extractor", Murderous)
    config = dataclasses.replace(FEATURES, shard_rows=13)
    out = tmp_path / "features"
    with pytest.raises(DraftlineError, match="died 4 times .* features.batch_tokens"):
        extract(config, TARGET, corpus_dir, out, cache_dir)
    assert not out.exists(), "and the shards made before wait for the next try"


def test_a_killed_driver_goes_on_where_it_was(ray_here, corpus_dir, cache_dir, tmp_path) -> None:
    out = tmp_path / "features"
    command = [sys.executable, "-c", DRIVER, str(corpus_dir), str(out), str(cache_dir)]
    driver = psutil.Process(subprocess.Popen(command, start_new_session=True).pid)
    try:
        assert wait_for(lambda: len(done_shards(out)) >= 3)
        family = driver.children(recursive=True)
    finally:
        driver.kill()
    _, left = psutil.wait_procs([driver, *family], timeout=20)
    for process in left:
        process.kill()
    before = done_shards(out)
    assert 3 <= len(before) < 26 and not out.exists()
    extract(CONFIG, TARGET, corpus_dir, out, cache_dir)
    after = {f.name: f.stat().st_mtime_ns for f in out.glob("*.safetensors")}
    assert {name: after[name] for name in before} == before
    assert_every_row_once(out, corpus_dir, cache_dir)
