"""What killed workers leave in a machine's temporary folder goes away with their own run's next start."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from pipeline.training import checkpoints


class _Engine:
    def save_checkpoint(self, folder: str, tag: str, client_state: dict[str, int]) -> None:
        (Path(folder) / tag).mkdir()


def test_a_start_clears_what_was_left_of_its_own_run_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def save(run: str) -> Path:
        made = checkpoints.save(
            _Engine(), None, run=run, step=3, rank=0, world=2, stage=1, survival=[], counts={"skipped_samples": 4.0}
        )
        return Path(made)

    left, others = [save("aaaa") for _ in range(2)], save("bbbb")
    (tmp_path / "draftline-aaaa-universal-1234").mkdir()
    checkpoints.clear("aaaa")
    assert list(tmp_path.iterdir()) == [others]
    assert not any(folder.exists() for folder in left)


def test_counts_come_back_and_a_checkpoint_of_before_has_none(tmp_path: Path) -> None:
    meta = {"step": 3, "world": 2, "survival": [], "counts": {"skipped_samples": 4.0}}
    assert checkpoints.Resume(tmp_path, tmp_path, "deepspeed", meta).counts == {"skipped_samples": 4.0}
    meta.pop("counts")
    assert checkpoints.Resume(tmp_path, tmp_path, "deepspeed", meta).counts == {}
