"""A training worker is killed in the middle: the run goes on and ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import torch
from safetensors.torch import load_file, save_file

from pipeline import artifact
from pipeline.config import CorpusConfig, PipelineConfig, TargetConfig, from_plain
from pipeline.corpus.build import build_corpus, read_rows
from pipeline.target import TapCapture, Target, load_target
from pipeline.training.trainer import train
from pipeline.training.worker import rows_of_step

STEPS, EVERY, LAYERS = 18, 6, [0, 2]
TIMINGS = ("anchors_per_second", "starved_seconds", "eta_seconds")


def test_every_row_is_used_once_per_epoch_whatever_step_a_run_starts_from() -> None:
    rows, per_step = 12, 4
    epochs = [[i for step in range(e * 3, e * 3 + 3) for i in rows_of_step(step, rows, per_step, 5)] for e in range(3)]
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
    assert epochs[0] != epochs[1], "each epoch has an order of its own"
    assert rows_of_step(7, rows, per_step, 5) == epochs[2][4:8]


def _corpus(target: Target, folder: Path) -> Path:
    said = ["Paris is the capital.", "The answer is nineteen, and that is all.", "Apples, pears and plums."]
    talks = [
        {"messages": [{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": said[i % 3] * 2}]}
        for i in range(24)
    ]
    source = folder / "talks.jsonl"
    source.write_text("".join(json.dumps(t) + "\n" for t in talks))
    build_corpus(CorpusConfig(source=str(source)), target.tokenizer, target.identity.as_dict(), folder / "corpus")
    return folder / "corpus"


def _features(target: Target, corpus: Path, out: Path) -> Path:
    """A features artifact of one shard, written by its format rather than by the extraction."""
    shard = "shard-00000.safetensors"
    rows = read_rows(corpus, "train")
    ids = [torch.as_tensor(r.input_ids) for r in rows]
    taps, last = [], []
    for row in ids:
        with TapCapture(target.family, LAYERS) as capture, torch.no_grad():
            last.append(target.family.backbone(row.long()[None], use_cache=False).last_hidden_state[0])
        taps.append(capture.taps()[0])
    tensors = {
        "taps": torch.cat(taps).bfloat16(),
        "last_hidden": torch.cat(last).bfloat16(),
        "input_ids": torch.cat(ids),
        "loss_mask": torch.cat([torch.as_tensor(r.loss_mask) for r in rows]).to(torch.uint8),
        "offsets": torch.tensor([0, *(len(i) for i in ids)]).cumsum(0),
    }
    with artifact.create(out, "features", config={}, target=target.identity.as_dict()) as staging:
        save_file(tensors, staging.path / shard, metadata={"sample_ids": json.dumps([r.sample_id for r in rows])})
        shards = [{"name": shard, "rows": len(rows), "tokens": sum(len(i) for i in ids)}]
        staging.info |= {"target_layer_ids": LAYERS, "hidden_size": target.hidden_size, "shards": shards}
    return out


def _reported(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for f in run_dir.glob("train/history-*.jsonl") for line in f.read_text().splitlines()]


class _Killer(threading.Thread):
    """Kills one training worker with SIGKILL once the run is past its first checkpoint, between two of them."""

    def __init__(self, run_dir: Path) -> None:
        super().__init__(daemon=True)
        self.run_dir = run_dir
        self.killed_after = 0

    def run(self) -> None:
        while not self.killed_after:
            time.sleep(0.01)
            steps = [int(r["step"]) for r in _reported(self.run_dir)]
            if not steps or steps[-1] <= EVERY + 1 or steps[-1] % EVERY == 0:
                continue
            for process in psutil.Process().children(recursive=True):
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    self.killed_after = steps[-1]
                    os.kill(process.pid, signal.SIGKILL)
                    break


@pytest.mark.timeout(600)  # three starts of two workers: about a minute alone, several on a crowded machine
@pytest.mark.ray
@pytest.mark.fault
def test_a_killed_worker_changes_neither_the_loss_curve_nor_the_draft(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    cache = tmp_path / "cache"
    target = load_target(TargetConfig(path="tiny"), cache)
    corpus = _corpus(target, tmp_path)
    features = _features(target, corpus, tmp_path / "features")
    config = from_plain(
        PipelineConfig,
        {
            "target": {"path": "tiny"},
            "draft": {
                "num_layers": 1, "block_size": 3, "target_layer_ids": LAYERS, "markov_rank": 8, "draft_vocab_size": 128,
            },
            "features": {"target_layer_ids": LAYERS},
            "trainer": {
                "steps": STEPS, "sequences_per_step": 4, "num_anchors": 6, "workers": 2, "log_every": 1,
                "checkpoint_every": EVERY, "warmup_steps": 2, "max_failures": 2,
            },
            "deepspeed": {"zero_optimization": {"stage": 2}},
        },
    )  # fmt: skip

    def run(name: str) -> Path:
        train(
            config,
            features_dir=features,
            corpus_dir=corpus,
            out=tmp_path / name / "draft",
            run_dir=tmp_path / name,
            cache_dir=cache,
        )
        return tmp_path / name

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        killer = _Killer(tmp_path / "killed")
        killer.start()
        killed = run("killed")
        assert EVERY < killer.killed_after < STEPS, "no worker was killed while the run was going"
        whole = run("whole")
    finally:
        ray.shutdown()

    curves = [[{k: v for k, v in r.items() if k not in TIMINGS} for r in _reported(d)] for d in (killed, whole)]
    assert [r["step"] for r in curves[0]] == list(range(1, STEPS + 1)), "each step once in the history that counts"
    assert curves[0] == curves[1]
    weights = [load_file(d / "draft" / "model.safetensors") for d in (killed, whole)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert curves[1][-1]["loss"] < curves[1][0]["loss"]
