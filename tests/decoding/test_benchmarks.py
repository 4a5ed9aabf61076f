"""The benchmarks of decoding run to their end and write what they print."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from pipeline.config import TargetConfig
from pipeline.decoding import Request
from pipeline.decoding.request import Completion, RequestMetrics, StepEvent
from pipeline.drafts.checkpoint import save_draft
from pipeline.target import load_target
from tests.drafts.samples import small_draft

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("benchmarks")
    target = load_target(TargetConfig(path="tiny"), root / "cache")
    save_draft(root / "draft", small_draft(target), target=target.identity.as_dict(), config={}, inputs={})
    return ["--draft", str(root / "draft"), "--cache", str(root / "cache"), "--target", "tiny", "--threads", "1"]


def run(script: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, f"benchmarks/{script}", *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
    )


def results(script: str, *options: str) -> dict[str, Any]:
    ran = run(script, *options)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found: dict[str, Any] = json.loads(Path(options[options.index("--json") + 1]).read_text())["results"]
    return found


def test_load(places: list[str], tmp_path: Path) -> None:
    plot = tmp_path / "load.svg"
    options = ["--levels", "1,3", "--passes", "2", "--max-new-tokens", "8", "--bootstrap", "50", "--plot", str(plot)]
    found = results("load.py", *places, *options, "--json", str(tmp_path / "load.json"))
    assert [set(found[n]) for n in ("1", "3")] == [{"none", "ngram", "draft fixed", "draft"}] * 2
    for arms in found.values():
        assert arms["none"]["totals"] == 1.0 and arms["none"]["mean_length"] == 0.0
        assert arms["draft fixed"]["skipped"] == 0.0 < arms["draft fixed"]["mean_length"]
        assert all(r["totals_low"] <= r["totals"] <= r["totals_high"] for r in arms.values())
    assert plot.stat().st_size > 1000
    joined = run("load.py", "--join", str(tmp_path / "load.json"), "--plot", str(tmp_path / "joined.png"))
    assert joined.returncode == 0 and "draft fixed" in joined.stdout and (tmp_path / "joined.png").stat().st_size > 1000


class Finishing:
    """An engine in which request i ends in step `ends[i]`, one token a step each, all of them verified and accepted."""

    def __init__(self, ends: list[int]) -> None:
        self.ends, self.flying, self.now = ends, dict[str, int](), 0

    @property
    def has_work(self) -> bool:
        return bool(self.flying)

    def submit(self, request: Request) -> None:
        self.flying[request.id] = self.ends[int(request.id)]

    def step(self) -> list[StepEvent]:
        self.now += 1
        events = []
        for name, end in list(self.flying.items()):
            done = None
            if end == self.now:
                del self.flying[name]
                metrics = RequestMetrics(decoded=end, target_steps=end, verified=end, accepted=end, seconds=1.0)
                done = Completion(name, [], "length", metrics)
            events.append(StepEvent(name, [1], done))
        return events


def test_a_pass_under_load_counts_all_its_numbers_while_all_places_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    load = importlib.import_module("load")
    asked, done = [Request([1], id=str(i)) for i in range(4)], load.Pass()
    ticks = itertools.count()
    monkeypatch.setattr(load.time, "perf_counter", lambda: float(next(ticks)))  # a second a step, asked around it
    steps = list(load.drive(Finishing([3, 5, 7, 20]), asked, 2, done))  # the last is alone from the seventh step on
    assert (len(steps), done.clock, done.seconds) == (20, 20.0, 7.0)
    assert (done.tokens, done.rounds, done.verified, done.accepted) == (14, 15, 15, 15)
    assert done.per_user == [3 / 2, 5 / 4, 7 / 3], "from its first token on: in the first step, or the fourth"


def test_the_arm_that_decoded_for_the_least_time_is_next(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    load = importlib.import_module("load")
    now, waits, asked = [0.0], [], [Request([1], id=str(i)) for i in range(2)]
    monkeypatch.setattr(load.time, "perf_counter", lambda: now[0])
    passes = {"quick": load.Pass(), "slow": load.Pass()}
    behind: list[bool] = []

    class Timed(Finishing):
        def __init__(self, name: str, seconds: float) -> None:
            super().__init__([12, 12])
            self.name, self.seconds = name, seconds

        def step(self) -> list[StepEvent]:
            ended = any(self.ends[0] == e.now for e in engines.values())
            behind.append(ended or passes[self.name].clock == min(p.clock for p in passes.values()))
            now[0] += self.seconds
            return super().step()

    engines = {"quick": Timed("quick", 1.0), "slow": Timed("slow", 2.5)}
    runs = {n: load.drive(e, asked, 2, passes[n], lambda: waits.append(now[0])) for n, e in engines.items()}
    load.take_turns(runs, passes)
    assert all(behind) and len(behind) == len(waits) == 24 and not runs
    assert (passes["quick"].clock, passes["slow"].clock) == (12.0, 30.0)


@pytest.mark.slow
def test_engine(places: list[str], tmp_path: Path) -> None:
    sizes = ["--prompts", "2", "--max-new-tokens", "8", "--repeats", "2", "--context", "512", "--output", "24"]
    found = results("engine.py", *places, *sizes, "--bootstrap", "50", "--json", str(tmp_path / "engine.json"))
    assert set(found["generate"]) == {"transformers generate", "engine, plain"}
    assert set(found["steps"]) == {"1 tokens", "2 tokens", "4 tokens", "8 tokens"}
    assert "draft, temperature 1, ratio" in found["draft"]
    assert found["context"]["output of 24, quarter 4"]["milliseconds"] > 0
    shares = found["overhead"]["draft"]
    assert sum(shares[k] for k in ("target", "draft", "verify", "outside")) == pytest.approx(1, abs=1e-3)


def shape(folder: Path) -> Path:
    """A config.json of a small model."""
    sizes = {"vocab_size": 400, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}
    file = folder / "small.json"
    file.write_text(json.dumps({"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **sizes, **heads}))
    return file


@pytest.mark.slow
def test_injected_acceptance_is_what_was_asked_and_labelled(tmp_path: Path) -> None:
    out = tmp_path / "injected.json"
    sizes = ["--levels", "1,3", "--passes", "2", "--max-new-tokens", "40", "--prompt-tokens", "20", "--bootstrap", "50"]
    sizes += ["--draft-layers", "1", "--block", "3", "--threads", "1", "--device", "cpu", "--dtype", "float32"]
    found = results("injected.py", "--shape", str(shape(tmp_path)), *sizes, "--acceptance", "0.9", "--json", str(out))
    assert json.loads(out.read_text())["acceptance"] == "injected"
    for arms in found.values():
        assert set(arms) == {"none", "injected fixed", "injected"}
        fixed = arms["injected fixed"]
        # 0.9 + 0.81 + 0.73 of blocks of three, less where a text ends inside one.
        assert fixed["accepted"] == pytest.approx(2.44, abs=0.6) and fixed["mean_length"] > 2.5


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("command", [["injected.py"], ["kernels.py", "--only", "speed"]])
def test_without_a_cuda_device_what_needs_one_says_so(command: list[str]) -> None:
    ran = run(*command)
    assert ran.returncode == 2 and "no CUDA device here" in ran.stdout + ran.stderr


def test_a_kernel_s_line_says_what_was_replayed_and_what_launched_from_python(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    device_clock = importlib.import_module("device_clock")
    clock = object.__new__(device_clock.Clock)  # without its tensor on a device
    monkeypatch.setattr(clock, "_median", lambda call, before: call(), raising=False)
    captured: dict[float, Any] = {0.3: (lambda: 0.05, "")}  # by what a launch takes
    monkeypatch.setattr(device_clock, "capture", lambda call: captured.get(call(), (None, "it waits for the device")))
    kernel, reference = clock(lambda: 0.3), clock(lambda: 4.0)
    table = device_clock.Table(2000.0)
    table.add("verify, T 64", 75_000_000, kernel, reference, "fails", {"SDPA": clock(lambda: 0.5)})
    table.add("other", 75_000_000, reference, reference, kernel)
    legend, head, *lines = capsys.readouterr().out.splitlines()
    assert "replayed from a CUDA graph" in legend and head.split()[:3] == ["kernel", "ms", "eager"]
    assert lines[0].split() == ["verify,", "T", "64", "0.050", "0.300", "1500", "75%", "4.000", "e", "fails"]
    assert lines[1].split() == ["SDPA", "0.500", "e"]
    assert lines[2].split() == ["other", "4.000", "e", "4.000", "19", "1%", "4.000", "e", "0.050"]
    assert lines[3].split(": ")[1] == "it waits for the device"
    assert max(map(len, [legend, head, *lines])) <= 120
    first = table.rows[0]
    assert (first["ms"], first["eager"], first["why_eager"]) == (0.05, 0.3, "")
    assert first["against"]["reference"]["why_eager"] == "it waits for the device"
    assert first["against"]["compiled"] == "fails"


@pytest.mark.parametrize("fails_at", [0, 1, 2], ids=["nowhere", "a wait", "capture"])
def test_a_call_that_can_not_be_captured_leaves_the_device_as_it_was(
    monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    """On a stand-in for torch.cuda: what is asked of it, in order."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    device_clock = importlib.import_module("device_clock")
    cuda, calls = mock.MagicMock(), itertools.count(1)
    cuda.graph.return_value.__exit__.return_value = cuda.stream.return_value.__exit__.return_value = False
    monkeypatch.setattr(device_clock.torch, "cuda", cuda)

    def call() -> None:
        if next(calls) == fails_at:
            raise RuntimeError("called a synchronizing operation\nand more")

    replay, why = device_clock.capture(call)
    assert (replay is None) == bool(fails_at) and why == ("called a synchronizing operation" if fails_at else "")
    assert [c.args for c in cuda.set_sync_debug_mode.call_args_list] == [("error",), ("default",)]
    assert cuda.graph.called == (fails_at != 1), "no capture is begun that would fail"
    assert cuda.set_stream.call_args_list == ([mock.call(cuda.current_stream())] if fails_at == 2 else [])
