"""The kernels against their references, torch.compile and the device's own copy; the vocabulary loss's memory.

python benchmarks/kernels.py --json kernels.json

memory: peak memory and time of the vocabulary loss, forward and backward, against the plain formulation (full fp32
logits of draft and target, two softmaxes, autograd), each in a process of its own. On CPU the peak is the process's
highest resident set (VmHWM, reset before) over what it held with the inputs built; on CUDA max_memory_allocated
likewise.

speed: needs a CUDA device. Medians over `--repeats` replays of a CUDA graph with the second-level cache flushed before
each, and beside them over launches from Python; what can't be captured is timed so and marked. The share is of the
bandwidth (read + write) of a copy timed in the same run, counting only the bytes that must move. Attention is
timed against SDPA and FlexAttention too, which get keys and values gathered beforehand: no pages to follow.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from device_clock import Clock, Spent, Table
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from draftline_kernels import (
    Adjustment,
    Overrides,
    RowStats,
    Sampling,
    markov_block,
    proposal_stream,
    ragged_paged_attention,
    touched,
    verify,
    vocab_loss,
)
from draftline_kernels.markov_block import reference as reference_block
from draftline_kernels.ragged_paged_attention import reference as reference_attention
from draftline_kernels.row_losses import RowTargets, reference_, row_losses_
from draftline_kernels.verify import reference as reference_verify

VOCABULARY, HIDDEN, RANK, SLOTS = 151_936, 1024, 256, 7
HEADS, KV_HEADS, DIM, PAGE = 32, 8, 128, 16
_MIB = 1 << 20


def machine() -> str:
    """The device's name, or the processor's and its threads in use."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    found = re.search(r"model name\s*: (.*)", info)
    return f"{found[1] if found else platform.processor()}, {torch.get_num_threads()} threads"


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
            self.held = self._status("VmRSS")

    def read(self) -> int:
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated() - self.held
        return self._status("VmHWM") - self.held

    @staticmethod
    def _status(name: str) -> int:
        found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found
        return int(found[1]) * 1024


def loss_step(side: str, rows: int, rank: int, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """One side's peak bytes, seconds (best of repeats) and loss, at Qwen3's vocabulary."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    lm_rows = (torch.randn(VOCABULARY, HIDDEN, device=device) * 0.03).to(dtype)
    target = torch.randn(rows, HIDDEN, device=device)
    hidden = (target + 0.3 * torch.randn_like(target)).requires_grad_()
    codes = torch.randn(rows, max(rank, 1), device=device, requires_grad=True)
    w2 = (torch.randn(VOCABULARY, max(rank, 1), device=device) * 0.01).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (rows,), device=device)
    ce_weight, l1_weight = torch.full((2, rows), 1 / rows, device=device) * torch.tensor([[0.1], [0.9]], device=device)

    def plain() -> torch.Tensor:
        z = F.linear(hidden.to(dtype), lm_rows).float()
        if rank:
            z = z + F.linear(codes.to(dtype), w2.to(dtype)).float()
        p = F.linear(target.to(dtype), lm_rows).float().softmax(-1)
        ce = F.cross_entropy(z, labels, reduction="none")
        l1 = (z.softmax(-1) - p).abs().sum(-1)
        return (ce * ce_weight + l1 * l1_weight).sum()

    def fused() -> torch.Tensor:
        head = (codes, w2) if rank else (None, None)
        off = torch.zeros_like(ce_weight)
        return vocab_loss(hidden, *head, lm_rows, target, None, None, labels, ce_weight, off, l1_weight)[0]

    step = {"plain": plain, "vocab_loss": fused}[side]
    peak = Peak()
    spent = []
    for _ in range(repeats):
        hidden.grad = codes.grad = w2.grad = None
        began = time.perf_counter()
        loss = step()
        loss.backward()
        value = float(loss.detach())  # waits for the device
        spent.append(time.perf_counter() - began)
    return {"peak_bytes": peak.read(), "seconds": min(spent), "loss": value}


def memory(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Both sides of the vocabulary loss, each in its own process; prints the table."""
    rows = args.anchors * SLOTS
    out = []
    print(f"vocabulary loss, forward and backward: V {VOCABULARY}, hidden {HIDDEN}, {args.anchors} x {SLOTS} rows")
    print(f"{'rank':>5} {'dtype':<9}{'side':<12}{'peak MiB':>10}{'seconds':>9}{'loss':>10}")
    for rank in args.ranks:
        pair: dict[str, dict[str, float]] = {}
        for side in ("plain", "vocab_loss") * args.rounds:
            call = [sys.executable, __file__, "--child", side, "--anchors", str(args.anchors), "--ranks", str(rank)]
            call += ["--dtype", args.dtype, "--repeats", str(args.repeats), "--threads", str(args.threads)]
            done = subprocess.run(call, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"the {side} side failed:\n{done.stderr[-2000:]}")
            r = json.loads(done.stdout.splitlines()[-1])
            if side in pair:  # by turns, the best of each: what else runs here slows one or the other
                r["seconds"] = min(r["seconds"], pair[side]["seconds"])
            pair[side] = r
        for side, r in pair.items():
            out.append({"side": side, "rank": rank, "dtype": args.dtype, "rows": rows, **r})
            figures = f"{r['peak_bytes'] / _MIB:>10.0f}{r['seconds']:>9.2f}{r['loss']:>10.5f}"
            print(f"{rank:>5} {args.dtype:<9}{side:<12}{figures}", flush=True)
        ours, theirs = pair["vocab_loss"], pair["plain"]
        print(
            f"      memory {ours['peak_bytes'] / theirs['peak_bytes']:.3f} of plain, "
            f"{theirs['seconds'] / ours['seconds']:.2f}x its speed"
        )
    return out


def overrides_of(tokens: torch.Tensor, touching: int, device: str) -> Overrides | None:
    """Bias and all penalties of requests with these proposed tokens [B, K] and about as many touched tokens each, as
    common as those of texts: most ids are low."""
    g = torch.Generator().manual_seed(1)
    adjustment = Adjustment(1.1, 0.2, 0.3, {token: 1.0 for token in range(0, 50_000, 1000)})
    parts = []
    for proposed in tokens.tolist():
        ids = (torch.rand(4 * touching, generator=g) ** 3 * VOCABULARY).long().unique()
        text = ids[torch.randperm(len(ids), generator=g)][: touching - 50].tolist()
        prompt, answer = text[: 2 * touching // 3], text[2 * touching // 3 :]
        parts.append(touched(adjustment, prompt=prompt, answer=answer, proposed=proposed, vocabulary=VOCABULARY))
    return Overrides.of(parts, [SLOTS + 1] * len(parts), VOCABULARY, device)


def verify_cases(dtype: torch.dtype, rows: int, device: str) -> dict[str, tuple[dict[str, Any], int]]:
    """Arguments of `verify` by name, and the bytes each must move: rows / 8 requests of 7 tokens each."""
    g = torch.Generator(device).manual_seed(0)
    batch = rows // (SLOTS + 1)
    logits = (torch.randn(rows, VOCABULARY, generator=g, device=device) * 3).to(dtype)
    q = torch.randn(batch, SLOTS, VOCABULARY, generator=g, device=device)
    best = logits.argmax(-1).view(batch, SLOTS + 1)[:, :SLOTS].contiguous()
    size = logits.numel() * logits.element_size()
    lengths = torch.full((batch,), SLOTS, device=device)
    common = {
        "target_logits": logits,
        "tokens": best,
        "lengths": lengths,
        "cu_lengths": torch.arange(batch + 1, device=device) * (SLOTS + 1),
        "positions": torch.arange(batch, device=device),
    }
    asks = {"greedy": (0.0, 0, 1.0), "sampled": (1.0, 0, 1.0), "nucleus": (0.8, 0, 0.95), "top-k": (0.8, 50, 1.0)}
    cases = {}
    for name, ask in asks.items():
        sampling = Sampling.of([(*ask, b) for b in range(batch)], device)
        cases[f"coupled {name}"] = ({**common, "sampling": sampling, "rule": "coupled"}, size)
    # A long chat's many touched tokens are read anew by every sweep of top-k and top-p.
    for name, ask, touching in (
        ("min-p and penalties", (0.8, 0, 1.0, 0.05), 500),
        ("top-k, top-p and 4,000 penalties", (0.8, 50, 0.95, 0.0), 4000),
    ):
        sampling = Sampling.of([(*ask[:3], b, ask[3]) for b in range(batch)], device)
        overrides = overrides_of(best, touching, device)
        adjusted = {**common, "sampling": sampling, "rule": "coupled", "overrides": overrides}
        cases[f"coupled {name}"] = (adjusted, size)
    sampling = Sampling.of([(1.0, 0, 1.0, b) for b in range(batch)], device)
    ratio = {**common, "sampling": sampling, "rule": "ratio", "draft_logits": q}
    cases["ratio sampled"] = (ratio, size + q.numel() * q.element_size())
    return cases


def loss_case(dtype: torch.dtype, rows: int, device: str) -> tuple[list[Any], Callable[[], None], int]:
    """Arguments of `row_losses_`, what restores its overwritten logits, and the bytes that must move."""
    g = torch.Generator(device).manual_seed(0)
    kept = [torch.randn(rows, VOCABULARY, generator=g, device=device).to(dtype) for _ in range(2)]
    base, target = (t.clone() for t in kept)
    ids = torch.randint(0, VOCABULARY, (rows,), generator=g, device=device)
    weight = torch.rand(rows, generator=g, device=device)
    targets = RowTargets(kept[1].float().logsumexp(-1), ids, ids, weight, weight, weight)
    out = RowStats(*(torch.zeros(rows, device=device) for _ in range(3)), torch.zeros_like(ids, dtype=torch.bool))

    def restore() -> None:
        base.copy_(kept[0])
        target.copy_(kept[1])

    return [base, None, target, targets, out], restore, 3 * base.numel() * base.element_size()


def block_case(dtype: torch.dtype, batch: int, device: str) -> tuple[dict[str, Any], int]:
    """Arguments of `markov_block` over the whole vocabulary, and the bytes that must move: W2 once per slot."""
    g = torch.Generator(device).manual_seed(0)
    w1 = torch.randn(VOCABULARY, RANK, generator=g, device=device).to(dtype)
    base = (torch.randn(batch, SLOTS, VOCABULARY, generator=g, device=device) * 3).to(dtype)
    inputs = {
        "base": base,
        "code": lambda k, previous: w1[previous],
        "w2": (torch.randn(VOCABULARY, RANK, generator=g, device=device) * 0.05).to(dtype),
        "anchor_tokens": torch.zeros(batch, dtype=torch.int64, device=device),
        "anchors": torch.arange(batch, device=device),
        "sampling": Sampling.of([(1.0, 0, 1.0, b) for b in range(batch)], device),
        "vocabulary": VOCABULARY,
    }
    return inputs, (SLOTS * VOCABULARY * RANK + base.numel()) * base.element_size()


def attention_case(
    dtype: torch.dtype, batch: int, past: int, count: int, device: str
) -> tuple[dict[str, Any], dict[str, Callable[[], Any]], int]:
    """Arguments of `ragged_paged_attention` over shuffled pages, other attentions of the same over keys and values that
    are gathered already, and the bytes that must move: keys and values once, queries and results."""
    g = torch.Generator(device).manual_seed(0)
    pages = -(-(past + count) // PAGE)
    table = torch.randperm(batch * pages, generator=g, device=device).view(batch, pages).to(torch.int32)
    k, v = (torch.randn(KV_HEADS, batch * pages * PAGE, DIM, generator=g, device=device, dtype=dtype) for _ in range(2))
    q = torch.randn(batch * count, HEADS, DIM, generator=g, device=device, dtype=dtype)
    inputs = {
        "q": q,
        "k_cells": k,
        "v_cells": v,
        "page_table": table,
        "cu_q": torch.arange(batch + 1, dtype=torch.int32, device=device) * count,
        "context": torch.full((batch,), past, dtype=torch.int32, device=device),
        "page_size": PAGE,
        "scale": DIM**-0.5,
    }
    cells = (table.long()[:, :, None] * PAGE + torch.arange(PAGE, device=device)).flatten(1)[:, : past + count]
    keys, values = (cache[:, cells].transpose(0, 1).contiguous() for cache in (k, v))
    queries = q.view(batch, count, HEADS, DIM).transpose(1, 2).contiguous()
    size = (2 * q.numel() + 2 * keys.numel()) * q.element_size()
    seen = create_block_mask(lambda b, h, i, j: j <= i + past, None, None, count, past + count, device=device)
    flex = torch.compile(flex_attention)
    gathered = {
        "SDPA": partial(
            F.scaled_dot_product_attention,
            queries,
            keys,
            values,
            attn_mask=causal_lower_right(count, past + count),
            enable_gqa=True,
        ),
        "FlexAttention": partial(flex, queries, keys, values, block_mask=seen, enable_gqa=True),
    }
    return inputs, gathered, size


def speed(args: argparse.Namespace) -> dict[str, Any]:
    """Times every kernel on the GPU; prints the table."""
    clock = Clock(args.repeats)
    source = torch.empty(512 * _MIB, dtype=torch.int16, device="cuda")
    sink = torch.empty_like(source)
    bandwidth = 2 * source.numel() * 2 / clock(partial(sink.copy_, source)).ms / 1e6
    del source, sink
    print(f"copy: {bandwidth:.0f} GB/s (read + write)")
    table = Table(bandwidth)

    def compiled(
        call: Callable[[], Any],
        before: Callable[[], Any] = lambda: None,
        what: str = "torch.compile of the reference",
    ) -> Spent | str:
        try:
            return clock(call, before)
        except Exception as error:  # the compiler's own failures are a result too
            print(f"  {what}: {str(error).splitlines()[0][:150]}", file=sys.stderr)
            return "fails"

    for dtype in (torch.bfloat16, torch.float32):
        kind = str(dtype).removeprefix("torch.")
        for rows in (64, 512):
            for name, (inputs, size) in verify_cases(dtype, rows, "cuda").items():
                whole = {"draft_logits": None, "d2t": None, "overrides": None, **inputs}
                quick = torch.compile(reference_verify)
                table.add(
                    f"verify {name}, T {rows}, {kind}",
                    size,
                    clock(partial(verify, **whole)),
                    clock(partial(reference_verify, **whole)),
                    compiled(partial(quick, **whole)),
                )
        arguments, restore, size = loss_case(dtype, 256, "cuda")
        quick_loss = torch.compile(reference_)
        table.add(
            f"vocab_loss rows, N 256, {kind}",
            size,
            clock(partial(row_losses_, *arguments), restore),
            clock(partial(reference_, *arguments, 0.0, True), restore),
            compiled(partial(quick_loss, *arguments, 0.0, True), restore),
        )
        for batch in (1, 16, 64):
            inputs, size = block_case(dtype, batch, "cuda")
            plain = {n: v for n, v in inputs.items() if n != "vocabulary"}
            plain |= {"d2t": None, "stream": proposal_stream("coupled"), "own_anchor": None, "logits": False}
            quick_block = torch.compile(reference_block)
            table.add(
                f"markov_block K {SLOTS}, B {batch}, {kind}",
                size,
                clock(partial(markov_block, **inputs)),
                clock(partial(reference_block, **plain)),
                compiled(partial(quick_block, **plain)),
            )
        for batch, past, count in ((64, 4096, SLOTS + 1), (1, 131_072, SLOTS + 1), (4, 4096, 512)):
            inputs, gathered, size = attention_case(dtype, batch, past, count, "cuda")
            plain = {"window": 0, "softcap": 0.0, "causal": True, **inputs}
            quick_attention = torch.compile(reference_attention)
            table.add(
                f"attention B {batch}, {past} + {count}, {kind}",
                size,
                clock(partial(ragged_paged_attention, **inputs)),
                clock(partial(reference_attention, **plain)),
                compiled(partial(quick_attention, **plain)),
                {name: compiled(call, what=name) for name, call in gathered.items()},
            )
    return {"copy_gb_per_s": bandwidth, "kernels": table.rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("memory", "speed"), default="")
    parser.add_argument("--anchors", type=int, default=64)
    parser.add_argument("--ranks", type=lambda s: [int(r) for r in s.split(",")], default=[0, RANK], help="0: no head")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the memory table")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2, help="turns of each side in the memory table")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", default="")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.child:
        dtype = getattr(torch, args.dtype)
        print(json.dumps(loss_step(args.child, args.anchors * SLOTS, args.ranks[0], dtype, args.repeats)))
        return
    report: dict[str, Any] = {"machine": machine(), "torch": torch.__version__, "settings": vars(args)}
    print(report["machine"])
    if args.only != "speed":
        report["memory"] = memory(args)
    if args.only != "memory":
        if torch.cuda.is_available():
            report["speed"] = speed(args)
        else:
            print(
                "speed: not measured, there is no CUDA device here. On one: python benchmarks/kernels.py --only speed"
            )
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=2) + "\n")
    if args.only == "speed" and not torch.cuda.is_available():
        raise SystemExit(2)


if __name__ == "__main__":
    main()
