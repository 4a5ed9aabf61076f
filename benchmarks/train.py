"""The training step against its plain formulation, side by side in one process: peak memory and time.

python benchmarks/train.py --json train.json

plain: the same draft, anchors, attention and optimizer, and the loss as it is usually written: every slot of every
block through both output matrices, full fp32 logits, two softmaxes, autograd. draftline: TrainStep. Both sides take
the same rows by turns, and their losses are printed: in the Qwen3 cases, where nothing is updated, they are of the same
weights and show that both compute the same; elsewhere the sides step one draft in turn.

Sizes are Qwen3's vocabulary at hidden 1024 (one sequence, 64 anchors x 7) and the demo's draft of SmolLM2-135M, on
random weights and features: neither memory nor time depends on their values. `epoch 1` scores the rows' positions
against the whole vocabulary first, as a run does once per row it keeps; a draft of the whole vocabulary needs none.

The peak is the highest resident set of the process (VmHWM, reset before each step, freed pages given back) over what
was held with weights, features and gradients' owners built; on CUDA max_memory_allocated likewise. Times are of
forward and backward; for SmolLM2 of clipping and AdamW too. Ratios are geometric means over the turns, with bootstrap
intervals of 95 %.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import itertools
import re
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from turns import ratio

from pipeline.artifact import write_json
from pipeline.drafts.config import DraftConfig
from pipeline.drafts.dspark import DSparkDraft
from pipeline.training.step import TrainStep, Weights

_MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Case:
    """A draft and its rows. markov: rank, 0 for none (and no confidence head). optimizer: whether its step is timed."""

    name: str
    vocabulary: int
    draft_vocabulary: int
    hidden: int
    heads: tuple[int, int, int]
    intermediate: int
    block: int
    markov: int
    anchors: int
    sequences: int
    length: int
    autocast: torch.dtype | None
    kept: bool
    optimizer: bool


_QWEN = Case("", 151_936, 151_936, 1024, (16, 8, 128), 3072, 7, 0, 64, 1, 512, None, False, False)
_SMOL = Case("", 49_152, 4096, 576, (9, 9, 64), 1536, 5, 128, 40, 4, 256, torch.bfloat16, True, True)
CASES = (
    dataclasses.replace(_QWEN, name="Qwen3, no heads, fp32"),
    dataclasses.replace(_QWEN, name="Qwen3, Markov 256, fp32", markov=256),
    dataclasses.replace(_QWEN, name="Qwen3, Markov 256, bf16", markov=256, autocast=torch.bfloat16),
    dataclasses.replace(_SMOL, name="SmolLM2, demo's draft, bf16"),
    dataclasses.replace(_SMOL, name="SmolLM2, demo's, epoch 1", kept=False),
    dataclasses.replace(_SMOL, name="SmolLM2, all 49152, bf16", draft_vocabulary=49_152),
    dataclasses.replace(_SMOL, name="SmolLM2, all 49152, fp32", draft_vocabulary=49_152, autocast=None),
)


class Peak:
    """Peak memory over what is held now, in bytes."""

    def __init__(self) -> None:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.held = torch.cuda.memory_allocated()
        else:
            # Freed pages that malloc keeps would be reused unseen.
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
            self.held = _status("VmRSS")

    def read(self) -> int:
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() - self.held
        return _status("VmHWM") - self.held


def _status(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


class Bench:
    """One case: a draft, rows in any number, and both sides' steps over them."""

    def __init__(self, case: Case, device: str) -> None:
        self.case, self.device = case, device
        torch.manual_seed(0)
        rows = torch.randn(case.vocabulary, case.hidden, device=device) * 0.03
        d2t = torch.randperm(case.vocabulary)[: case.draft_vocabulary].sort().values.to(device)
        heads, kv_heads, head_dim = case.heads
        config = DraftConfig(
            block_size=case.block,
            num_layers=1,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            hidden_size=case.hidden,
            intermediate_size=case.intermediate,
            target_layer_ids=[1, 8, 14, 20, 27],
            mask_token_id=0,
            rope_theta=1e4,
            rms_norm_eps=1e-6,
            markov_rank=case.markov,
            markov_head_type="vanilla" if case.markov else "none",
            enable_confidence_head=case.markov > 0,
        )
        self.draft = DSparkDraft(config, rows, rows, d2t).to(device)
        self.step = TrainStep(self.draft, rows, Weights(), num_anchors=case.anchors, seed=0, autocast=case.autocast)
        self.lm_head = self.step.lm_head
        self.optimizer = torch.optim.AdamW(self.draft.parameters(), lr=1e-4, fused=True)
        self.kept = [self.rows() for _ in range(4 if case.kept else 0)]
        for batch in self.kept:
            for row in batch:
                self.step.scores(self.step._placed(row, _no_blocks())[0])
        self._turn = 0

    _ids = itertools.count()

    def rows(self) -> list[Any]:
        """A step's rows, unseen: half of each is supervised."""
        out = []
        for _ in range(self.case.sequences):
            n, width = self.case.length, self.case.hidden
            mask = torch.arange(n) >= n // 2
            row = SimpleNamespace(
                sample_id=f"{next(self._ids):032x}",
                input_ids=torch.randint(self.case.vocabulary, (n,), dtype=torch.int32),
                loss_mask=mask,
                taps=torch.randn(n, 5 * width).bfloat16(),
                last_hidden=torch.randn(n, width).bfloat16(),
            )
            out.append(row)
        return out

    def batch(self) -> list[Any]:
        """The rows of the next turn."""
        self._turn += 1
        return self.kept[self._turn % len(self.kept)] if self.kept else self.rows()

    def plain(self, rows: list[Any], number: int) -> Tensor:
        """The loss from whole fp32 logits of draft and target."""
        step, draft, of = self.step, self.draft, self.step.weights
        found = [(r, step.blocks_of(r, number)) for r in rows]
        picked = [step._placed(r, b) for r, b in found if b is not None]
        weight = (step.position_weights * torch.cat([b.supervised for _, b in picked])).flatten()
        labels = step.t2d[torch.cat([step._labels(r, b) for r, b in picked])].flatten()
        previous = torch.cat([step._previous(r, b) for r, b in picked])
        seen = torch.cat([step._target_hidden(r, b) for r, b in picked]).flatten(0, 1)
        with torch.autocast(self.device, dtype=step.autocast or torch.bfloat16, enabled=step.autocast is not None):
            hidden = step.hidden(picked)
            z = F.linear(hidden, draft.lm_rows)
            if draft.markov_head is not None:
                codes = draft.markov_head.codes(hidden.unflatten(0, (-1, self.case.block)), previous)
                z = z + draft.markov_head.markov_w2(codes.flatten(0, 1))
            guess = draft.confidence(hidden, previous.flatten())
            with torch.no_grad():
                t = F.linear(seen.to(self.lm_head.dtype), self.lm_head)
        z, p = z.float(), t.float().softmax(-1)
        if self.case.draft_vocabulary < self.case.vocabulary:
            inside = p[:, draft.d2t]
            outside = (1 - inside.sum(-1)).clamp(min=0)
            l1 = (z.softmax(-1) - inside).abs().sum(-1) + outside
        else:
            l1 = (z.softmax(-1) - p).abs().sum(-1)
        ce = F.cross_entropy(z, labels.clamp(min=0), reduction="none") * (labels >= 0)
        loss = of.ce * (ce * weight).sum() / (weight * (labels >= 0)).sum().clamp(min=1e-6)
        rest = of.tv * l1
        if guess is not None:
            accepted = (1 - 0.5 * l1.detach()).clamp(0, 1)
            rest = rest + of.confidence * F.binary_cross_entropy_with_logits(guess.float(), accepted, reduction="none")
        return loss + (rest * weight).sum() / weight.sum()

    def turn(self, side: str, rows: list[Any], number: int) -> tuple[float, int, float]:
        """One step of a side: seconds, peak bytes, loss."""
        self.optimizer.zero_grad(set_to_none=True)
        peak = Peak()
        began = time.perf_counter()
        loss = self.plain(rows, number) if side == "plain" else self.step(rows, number)[0]
        loss.backward()
        if self.case.optimizer:
            torch.nn.utils.clip_grad_norm_(self.draft.parameters(), 1.0)
            self.optimizer.step()
        value = float(loss.detach())  # waits for the device
        return time.perf_counter() - began, peak.read(), value


def _no_blocks() -> Any:
    return SimpleNamespace(to=lambda _: None)


def compare(case: Case, turns: int, device: str) -> dict[str, Any]:
    """Both sides of a case, by turns."""
    bench = Bench(case, device)
    taken: dict[str, list[tuple[float, int, float]]] = {"plain": [], "draftline": []}
    for number in range(turns + 1):
        rows = bench.batch()
        for side in ("plain", "draftline") if number % 2 else ("draftline", "plain"):
            found = bench.turn(side, rows, number)
            if number:  # the first warms up
                taken[side].append(found)
    slots = sum(int(b.supervised.sum()) for r in rows if (b := bench.step.blocks_of(r, number)) is not None)
    out: dict[str, Any] = {"case": case.name, "slots": slots}
    for side, found in taken.items():
        seconds, peaks, losses = zip(*found, strict=True)
        out[side] = {
            "seconds": statistics.median(seconds),
            "microseconds_per_token": 1e6 * statistics.median(seconds) / slots,
            "peak_mib": max(peaks) / _MIB,
            "loss": losses[0],
        }
    both = list(zip(taken["plain"], taken["draftline"], strict=True))
    out["speed"] = ratio([(a[0], b[0]) for a, b in both])
    out["memory"] = ratio([(b[1], a[1]) for a, b in both])
    return out


def show(results: list[dict[str, Any]]) -> None:
    """Prints the table."""
    print(f"{'case':<30}{'slots':>6}{'us/token':>18}{'peak MiB':>18}{'speed':>24}{'memory':>24}{'loss':>18}")
    print(f"{'':<36}{'plain':>9}{'ours':>9}{'plain':>9}{'ours':>9}{'plain / ours':>24}{'ours / plain':>24}")
    for r in results:
        a, b = r["plain"], r["draftline"]
        row = f"{r['case']:<30}{r['slots']:>6}{a['microseconds_per_token']:>9.0f}{b['microseconds_per_token']:>9.0f}"
        row += f"{a['peak_mib']:>9.0f}{b['peak_mib']:>9.0f}"
        for key in ("speed", "memory"):
            mean, low, high = r[key]
            row += f"{mean:>10.3f} [{low:.3f}, {high:.3f}]".rjust(24)
        print(row + f"{a['loss']:>9.4f}{b['loss']:>9.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--turns", type=int, default=5, help="of every case, after one that warms up")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    results = [compare(case, args.turns, args.device) for case in CASES if args.only in case.name]
    show(results)
    if args.json:
        write_json(args.json, {"device": args.device, "torch": torch.__version__, "cases": results})


if __name__ == "__main__":
    main()
