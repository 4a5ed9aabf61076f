"""DeepSpeed around the objective, in this process: what bf16 may take down and what it must not."""

from __future__ import annotations

import copy
import math
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist
import yaml

from pipeline.config import TrainerConfig
from pipeline.errors import ConfigError
from pipeline.target import Target
from pipeline.training import engine
from pipeline.training.engine import (
    Objective,
    build_with_own_ninja,
    check_settings,
    make_engine,
    take_step,
    wait_for_operator,
)
from pipeline.training.step import TrainStep, Weights
from tests.drafts.samples import small_draft
from tests.training.test_step import _row


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Of the whole module: DeepSpeed keeps the first group that it sees."""
    place = tmp_path_factory.mktemp("group") / "rendezvous"
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
            patch.setenv(name, value)
        dist.init_process_group("gloo", init_method=f"file://{place}", rank=0, world_size=1)
        yield
        dist.destroy_process_group()


def test_the_lock_of_a_killed_build_is_taken_away_and_a_living_one_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("py311_cpu/deepspeed_shm_comm", "deepspeed_other", "py311_cpu/mine"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "lock").touch()
    old = time.time() - 400
    os.utime(tmp_path / "py311_cpu/deepspeed_shm_comm/lock", (old, old))
    builder = threading.Timer(0.5, (tmp_path / "deepspeed_other/lock").unlink)
    builder.start()
    began = time.monotonic()
    wait_for_operator(tmp_path)
    assert time.monotonic() - began >= 0.4, "the living one was waited for"
    assert [str(f.relative_to(tmp_path)) for f in tmp_path.rglob("lock")] == ["py311_cpu/mine/lock"]
    said = capsys.readouterr().out
    assert "of a build that was killed: removed" in said and "waits for another process" in said


def test_the_operator_is_built_by_the_environments_ninja(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ninja").touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "")  # so that it is put back
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR")
    for _ in range(2):
        build_with_own_ninja()
        assert os.environ["TORCH_EXTENSIONS_DIR"] == str(Path(sys.prefix) / "torch_extensions"), (
            "each environment's own"
        )
        assert os.environ["PATH"].split(os.pathsep) == [str(Path(sys.executable).parent), str(tmp_path)]
    assert shutil.which("ninja") == str(Path(sys.executable).parent / "ninja")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", "/somewhere")
    build_with_own_ninja()
    assert os.environ["TORCH_EXTENSIONS_DIR"] == "/somewhere", "a user's choice stays"


class _Asked(dict[str, Any]):
    """Notes the top-level keys that are asked for."""

    names: ClassVar[set[str]] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.names.add(key)
        return super().get(key, default)

    def __contains__(self, key: object) -> bool:
        self.names.add(str(key))
        return super().__contains__(key)

    def keys(self) -> Any:
        return self

    def __copy__(self) -> _Asked:
        return self


def test_the_settings_that_pass_are_those_deepspeed_asks_for() -> None:
    from deepspeed.runtime import config as deepspeed_config

    deepspeed_config.DeepSpeedConfig(_Asked(train_micro_batch_size_per_gpu=1, zero_optimization={"stage": 2}))
    refused = set(getattr(deepspeed_config, "_REMOVED_TOP_LEVEL_CONFIG_KEYS", ()))
    with_ranks = {"sequence_parallel_size"}  # asked for where there is a process group
    assert set(engine._DEEPSPEED.split()) == (_Asked.names | with_ranks) - refused - {"bfloat16"}


def test_a_setting_that_deepspeed_would_pass_over_is_refused_with_the_nearest_name() -> None:
    for file in (Path(__file__).parents[2] / "conf" / "deepspeed").glob("*.yaml"):
        check_settings(yaml.safe_load(file.read_text()))
    with pytest.raises(ConfigError, match=r"deepspeed.zero_optimisation is not .*Did you mean 'zero_optimization'\?"):
        check_settings({"zero_optimisation": {"stage": 3}, "zero_optimization": {"stage": 2}})
    with pytest.raises(ConfigError, match=r"zero_optimization.stage=0 must be 1, 2 or 3"):
        check_settings({"zero_optimization": {"stage": 0}})
    with pytest.raises(ConfigError, match=r"deepspeed.bfloat16 is not .*Did you mean 'bf16'\?"):
        check_settings({"bfloat16": {"enabled": True}, "zero_optimization": {"stage": 2}})
    with pytest.raises(ConfigError, match=r"deepspeed.fp16.enabled=true"):
        check_settings({"fp16": {"enabled": True}, "zero_optimization": {"stage": 2}})


@pytest.mark.usefixtures("one_rank")
def test_bf16_weights_have_fp32_masters_and_exact_rotary_frequencies(tiny: Target) -> None:
    from deepspeed.utils import safe_get_full_fp32_param

    draft = small_draft(tiny, vocabulary=200)
    frequencies, started = draft.inv_freq.clone(), copy.deepcopy(draft.state_dict())
    step = TrainStep(
        draft, tiny.family.lm_head.weight, Weights(), num_anchors=6, seed=0, autocast=torch.bfloat16, chunk=64
    )
    config = TrainerConfig(lr=1e-5, workers=1, sequences_per_step=2, accumulate=2, weight_decay=0.0)
    bf16 = {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}
    made, _ = make_engine(Objective(step), bf16, config, 1, universal=False)
    assert draft.fc.weight.dtype == torch.bfloat16
    assert draft.inv_freq.dtype == torch.float32 and torch.equal(draft.inv_freq, frequencies)
    assert draft.temperatures.dtype == torch.float32

    _, apply = take_step(made, step, [[_row(tiny, 30, 1)], [_row(tiny, 21, 2)]], 0, "tokens", lambda t: t, 1)
    apply()
    weight = draft.decoder_layers[0].mlp.gate_proj.weight
    master = safe_get_full_fp32_param(weight)
    before = started["layers.0.mlp.gate_proj.weight"]
    assert master.dtype == torch.float32
    # AdamW's first step is the learning rate in size: far below what bf16 can add to most weights.
    torch.testing.assert_close((master - before).abs().median(), torch.tensor(1e-5), rtol=0.01, atol=0)
    assert float((weight.float() == before.bfloat16().float()).double().mean()) > 0.5


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("stage", [2, 3])
def test_gradients_that_are_not_finite_are_told_and_change_nothing(tiny: Target, stage: int) -> None:
    from deepspeed.utils import safe_get_full_fp32_param

    draft = small_draft(tiny, vocabulary=200)
    step = TrainStep(draft, tiny.family.lm_head.weight, Weights(), num_anchors=6, seed=0, chunk=64)
    config = TrainerConfig(lr=1e-3, workers=1, sequences_per_step=1, accumulate=1)
    made, _ = make_engine(Objective(step), {"zero_optimization": {"stage": stage}}, config, 1, universal=False)
    batch = [[_row(tiny, 30, 1)]]
    _, apply = take_step(made, step, batch, 0, "tokens", lambda t: t, 1)
    assert apply()
    weight = draft.decoder_layers[0].mlp.gate_proj.weight
    before = safe_get_full_fp32_param(weight).clone()

    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad * float("nan")

    hidden = step.hidden
    step.hidden = lambda picked: Spoil.apply(hidden(picked))  # type: ignore[method-assign]
    metrics, apply = take_step(made, step, batch, 1, "tokens", lambda t: t, 1)
    assert math.isfinite(metrics.loss)
    assert not apply()
    assert torch.equal(safe_get_full_fp32_param(weight), before)
