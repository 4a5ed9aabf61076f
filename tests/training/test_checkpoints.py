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


def test_what_never_became_a_checkpoint_is_not_added_to_the_next_one_of_its_step(tmp_path: Path) -> None:
    """A worker had uploaded its part when another one's node died; then the run goes on with fewer workers."""
    for step in (2, 4, 6):
        (tmp_path / checkpoints.name_of(step) / "deepspeed").mkdir(parents=True)
        (tmp_path / checkpoints.name_of(step) / "deepspeed" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").touch()
    (tmp_path / "checkpoint_manager_snapshot.json").touch()
    checkpoints.discard(tmp_path, after=4)
    assert sorted(f.name for f in tmp_path.iterdir()) == [
        "checkpoint_manager_snapshot.json",
        checkpoints.name_of(2),
        checkpoints.name_of(4),
    ]
    checkpoints.discard(tmp_path / "none", after=0)
