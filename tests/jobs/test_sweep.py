"""A sweep is Hydra's multirun over training: every combination once, on one corpus and its features."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from jobs import sweep
from pipeline.config import PipelineConfig
from pipeline.errors import ConfigError, DraftlineError


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, PipelineConfig]]:
    """What ran, in order; a corpus and features are a file each, training fails with trainer.ema=0.5."""
    seen: list[tuple[str, PipelineConfig]] = []

    def stage(name: str) -> object:
        def make(config: PipelineConfig) -> SimpleNamespace:
            seen.append((name, config))
            if name == "train" and config.trainer.ema == 0.5:
                raise DraftlineError("it diverged")
            if not (config.run_dir / name).exists():
                (config.run_dir / name).mkdir(parents=True)
            numbers = {"tau": 1 + config.trainer.lr, "tau_greedy": 1.5, "loss": 2.0}
            return SimpleNamespace(info={"training": numbers})

        return make

    for module, name in ((sweep.corpus, "corpus"), (sweep.extract, "features"), (sweep.train, "train")):
        monkeypatch.setattr(module, "stage", stage(name))
    monkeypatch.setattr(sweep, "connect", lambda _: None)
    return seen


def test_every_combination_is_trained_once_on_what_they_share(
    tmp_path: Path, stages: list[tuple[str, PipelineConfig]], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["experiment=smoke", f"output_root={tmp_path}", f"cache_dir={tmp_path}/cache", "trainer.weight_decay=0.5"]
    argv += ["trainer.lr=0.1,0.2", "trainer.lk=0.5,1.5"]
    assert sweep.main(argv) == 0, capsys.readouterr()
    assert [name for name, _ in stages[:2]] == ["corpus", "features"]
    assert stages[0][1].name == "smoke"
    trained = [c for name, c in stages if name == "train"]
    assert sorted((c.trainer.lr, c.trainer.lk) for c in trained) == [(0.1, 0.5), (0.1, 1.5), (0.2, 0.5), (0.2, 1.5)]
    assert all(c.trainer.weight_decay == 0.5 for c in trained)
    assert len({c.name for c in trained}) == 4, "each has a run of its own"
    for config in trained:
        for part in ("corpus", "features"):
            assert (config.run_dir / part).resolve() == tmp_path / "smoke" / part
    said = capsys.readouterr().out.splitlines()
    rows = said[said.index("tau     greedy  loss    trial") + 1 :]
    assert rows[0].startswith("1.200") and "trainer.lr=0.2" in rows[0] and "smoke-" in rows[0]
    assert rows[3].startswith("1.100") and "trainer.lr=0.1" in rows[3]
    assert len(list((tmp_path / "smoke-sweep").glob("smoke-*.json"))) == 4

    names = {c.name for c in trained}
    assert sweep.main(argv) == 0
    again = {c.name for name, c in stages if name == "train"}
    assert again == names, "the same trials again find what they made"


def test_a_trial_that_fails_does_not_end_the_others(
    tmp_path: Path, stages: list[tuple[str, PipelineConfig]], capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["experiment=smoke", f"output_root={tmp_path}", f"cache_dir={tmp_path}/cache"]
    assert sweep.main([*argv, "trainer.ema=0.5,0.9"]) == 0
    said = capsys.readouterr().out
    assert "sweep: trainer.ema=0.5: it diverged" in said
    assert f"{'failed':<24}trainer.ema=0.5" in said
    assert sweep.main([*argv, "trainer.ema=0.5,0.5"]) == 2
    assert "No trial of the sweep could be trained" in capsys.readouterr().err
    left = [json.loads(f.read_text()) for f in (tmp_path / "smoke-sweep").glob("*.json")]
    assert [r["error"] for r in left] == ["it diverged"]


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("trainer.lr=0.1", "Nothing is swept. Give a setting several values"),
        ("trainer.lrr=0.1,0.2", "Did you mean 'lr'?"),
        ("draft=dspark,dsparc", "dsparc"),
        ("trainer.lr=[0.1", "can't be read"),
        ("experimnt=smoke,demo", "Did you mean 'experiment'?"),
    ],
)
def test_a_mistake_costs_nothing(
    argument: str,
    says: str,
    tmp_path: Path,
    stages: list[tuple[str, PipelineConfig]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["experiment=smoke", f"output_root={tmp_path}", f"cache_dir={tmp_path}/cache"]
    assert sweep.main([*argv, argument]) == 2
    assert says in capsys.readouterr().err
    assert stages == []


def test_settings_are_told_apart() -> None:
    asked = sweep.parse(["experiment=demo", "draft.target_layer_ids=[0,2]", "draft=dspark,dflash", "hydra/launcher=x"])
    assert asked.fixed == ["experiment=demo", "draft.target_layer_ids=[0,2]"]
    assert asked.swept == {"draft": sweep.Swept("draft=dspark,dflash", ["dspark", "dflash"])}
    assert asked.hydra == ["hydra/launcher=x"]
    with pytest.raises(ConfigError, match="can't be read"):
        sweep.parse(["a=(1"])
