"""Training runs on the tiny target: a corpus, its features, a configuration, and what a run reported."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Container
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from pipeline import artifact
from pipeline.config import CorpusConfig, PipelineConfig, TargetConfig, from_plain
from pipeline.corpus.build import build_corpus, read_rows
from pipeline.target import TapCapture, Target, load_target
from pipeline.training.trainer import train
from tests.processes import below

LAYERS = [0, 2]
SILENT = (3, 11)
TIMINGS = ("anchors_per_second", "starved_seconds", "eta_seconds", "memory_gib")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where the runs of a test are, and what they train on."""

    path: Path
    cache: Path
    corpus: Path
    features: Path

    def train(
        self,
        name: str,
        changes: dict[str, Any],
        deepspeed: dict[str, Any] | None = None,
        features: Path | None = None,
        draft: dict[str, Any] | None = None,
    ) -> Path:
        """Trains (or goes on) with changed trainer or draft settings, or other features; returns the run's folder."""
        config = configured(changes, deepspeed, draft)
        stream = config.features.mode == "stream"
        train(
            config,
            features_dir=None if stream else features or self.features,
            corpus_dir=self.corpus,
            out=self.path / name / "draft",
            run_dir=self.path / name,
            cache_dir=self.cache,
        )
        return self.path / name


def configured(
    changes: dict[str, Any], deepspeed: dict[str, Any] | None = None, of_draft: dict[str, Any] | None = None
) -> PipelineConfig:
    """A small run: 18 steps of 4 sequences on 2 workers. `changes` are the trainer's, but for `mode` (features)."""
    trainer = {
        "steps": 18, "sequences_per_step": 4, "num_anchors": 6, "workers": 2, "log_every": 1, "checkpoint_every": 6,
        "warmup_steps": 2, "max_failures": 2,
    }  # fmt: skip
    draft = {"num_layers": 1, "block_size": 3, "target_layer_ids": LAYERS, "markov_rank": 8, "draft_vocab_size": 128}
    mode = changes.get("mode", "store")
    return from_plain(
        PipelineConfig,
        {
            "target": {"path": "tiny"},
            "draft": draft | (of_draft or {}),
            "features": {"target_layer_ids": LAYERS, "mode": mode, "shard_rows": 8, "threads": 1},
            "trainer": trainer | {k: v for k, v in changes.items() if k != "mode"},
            "deepspeed": deepspeed or {"zero_optimization": {"stage": 2}},
        },
    )


def make_place(path: Path) -> Place:
    """A corpus of 24 conversations, two of them with nothing to learn from, and its features."""
    torch.set_num_threads(1)
    target = load_target(TargetConfig(path="tiny"), path / "cache")
    corpus = _silenced(_corpus(target, path), SILENT, path / "corpus")
    return Place(path, path / "cache", corpus, make_features(target, corpus, path / "features"))


def _corpus(target: Target, folder: Path) -> Path:
    said = ["Paris is the capital.", "The answer is nineteen, and that is all.", "Apples, pears and plums."]
    talks = [
        {"messages": [{"role": "user", "content": f"Question {i}?"}, {"role": "assistant", "content": said[i % 3] * 2}]}
        for i in range(24)
    ]
    source = folder / "talks.jsonl"
    source.write_text("".join(json.dumps(t) + "\n" for t in talks))
    build_corpus(CorpusConfig(source=str(source)), target.tokenizer, target.identity.as_dict(), folder / "spoken")
    return folder / "spoken"


def _silenced(corpus: Path, silent: Container[int], out: Path) -> Path:
    """A corpus in whose training rows `silent` no token counts."""
    made = artifact.load(corpus, "corpus")
    with artifact.create(out, "corpus", config=made.config, inputs=made.inputs, target=made.target) as staging:
        for name in made.files:
            shutil.copy(corpus / name, staging.path / name)
        file = staging.path / "rows-train.parquet"
        table = pq.read_table(file)
        at = table.schema.get_field_index("loss_mask")
        masks = [[m and i not in silent for m in row] for i, row in enumerate(table["loss_mask"].to_pylist())]
        pq.write_table(table.set_column(at, table.schema.field(at), pa.array(masks, table.schema.field(at).type)), file)
        staging.info |= made.info
        staging.counts |= made.counts
    return out


def make_features(
    target: Target, corpus: Path, out: Path, *, spoilt: int | None = None, masked: Container[int] = ()
) -> Path:
    """A features artifact of one shard, written by its format rather than by the extraction; row `spoilt` has a NaN,
    rows `masked` nothing to learn from."""
    shard = "shard-00000.safetensors"
    rows = read_rows(corpus, "train")
    ids = [torch.as_tensor(r.input_ids) for r in rows]
    taps, last = [], []
    for row in ids:
        with TapCapture(target.family, LAYERS) as capture, torch.no_grad():
            last.append(target.family.backbone(row.long()[None], use_cache=False).last_hidden_state[0])
        taps.append(capture.taps()[0])
        if len(taps) - 1 == spoilt:
            taps[-1] = taps[-1].clone()
            taps[-1][0] = float("nan")
    tensors = {
        "taps": torch.cat(taps).bfloat16(),
        "last_hidden": torch.cat(last).bfloat16(),
        "input_ids": torch.cat(ids),
        "loss_mask": torch.cat([torch.as_tensor(r.loss_mask) & (i not in masked) for i, r in enumerate(rows)]).to(
            torch.uint8
        ),
        "offsets": torch.tensor([0, *(len(i) for i in ids)]).cumsum(0),
    }
    with artifact.create(out, "features", config={}, target=target.identity.as_dict()) as staging:
        save_file(tensors, staging.path / shard, metadata={"sample_ids": json.dumps([r.sample_id for r in rows])})
        shards = [{"name": shard, "rows": len(rows), "tokens": sum(len(i) for i in ids)}]
        staging.info |= {"target_layer_ids": LAYERS, "hidden_size": target.hidden_size, "shards": shards}
    return out


def reported(run_dir: Path) -> list[dict[str, Any]]:
    """The reports of a run, in order of steps."""
    return [json.loads(line) for f in run_dir.glob("train/history-*.jsonl") for line in f.read_text().splitlines()]


def curve(run_dir: Path) -> list[float]:
    """Its loss by step."""
    return [r["loss"] for r in reported(run_dir)]


class Signaller(threading.Thread):
    """Sends one signal to a training worker, or to this process, once the run has reported a step above `after` that
    is not a multiple of `but`.

    Attributes:
        sent_after: the step last reported before it was sent; 0 if it was not.
        begun_again: after SIGKILL: whether workers began that were not there before.
    """

    def __init__(self, run_dir: Path, sent: signal.Signals, after: int, but: int, *, to_job: bool = False) -> None:
        super().__init__(daemon=True)
        self.run_dir, self.sent, self.after, self.but, self.to_job = run_dir, sent, after, but, to_job
        self.sent_after = 0
        self.begun_again = False

    def run(self) -> None:
        while not self.sent_after:
            time.sleep(0.01)
            steps = [int(r["step"]) for r in reported(self.run_dir)]
            if not steps or steps[-1] <= self.after or steps[-1] % self.but == 0:
                continue
            workers = below("RayTrainWorker")
            now = int(reported(self.run_dir)[-1]["step"])  # finding them takes a while
            if workers and now % self.but:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(os.getpid() if self.to_job else workers[-1], self.sent)
                    self.sent_after = now
        ends = time.monotonic() + 120
        while self.sent == signal.SIGKILL and not self.begun_again and time.monotonic() < ends:
            time.sleep(0.1)
            self.begun_again = bool(set(below("RayTrainWorker")) - set(workers))
