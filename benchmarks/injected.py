"""The engine's speedup at a real model's size without its weights: step costs are real, ACCEPTANCE IS INJECTED.

python benchmarks/injected.py --device cuda --json injected.json

The target has Qwen3-4B's shape and random weights, the draft is DSpark as its paper builds it, random too: both cost
what trained ones cost. What they say is replaced: the target says a text known beforehand, and every token of a block
is that text's with probability `--acceptance`, given that those before it are. So throughput is what this engine makes
of a draft that is accepted so often, on this device, and says nothing about any draft.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import load
import numpy as np
import torch
import transformers
from served import settings

from pipeline.artifact import write_json
from pipeline.config import EngineConfig
from pipeline.decoding import Engine, make_proposer
from pipeline.decoding.proposers.base import Proposal
from pipeline.decoding.request import Sequence as Running
from pipeline.decoding.step_cost import device_name
from pipeline.decoding.table_layout import Segment
from pipeline.drafts.checkpoint import make_draft
from pipeline.drafts.config import DraftConfig, resolve
from pipeline.evaluation.benchmark import Arm
from pipeline.evaluation.metrics import rounded
from pipeline.target import Target, TargetIdentity, load_config

SHAPE = Path(__file__).parents[1] / "conf/target/qwen3_4b.json"
ARMS = (Arm("none", "none"), Arm("injected fixed", "draft", "fixed"), Arm("injected", "draft"))
_CERTAIN = 1e4


def random_target(shape: Path, dtype: torch.dtype, device: str) -> Target:
    """A target of a transformers config's shape, its weights as that family initialises them; it has no tokenizer."""
    config = load_config(shape)
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = config.eos_token_id or 0
    return Target(model, None, TargetIdentity(f"random {shape.stem}", "", "", "", ""))


def said(positions: torch.Tensor) -> torch.Tensor:
    """The text that the target is made to say, int64 by position: no eos, and no token twice in a row."""
    return 10 + positions * 89 % 300


def inject_text(engine: Engine) -> None:
    """Makes the target say `said`, whatever its weights: one logit a row is raised after each step. Which one that is
    the host works out, so that no step runs ahead of it."""
    inner = engine.runner.step

    @torch.inference_mode()
    def step(segments: list[Segment], tokens: list[int], rows: list[int]) -> tuple[torch.Tensor | None, torch.Tensor]:
        taps, logits = inner(segments, tokens, rows)
        following = torch.tensor([s.start + i + 1 for s in segments for i in range(s.count)])[rows]
        at = torch.arange(len(rows), device=logits.device)
        logits[at, said(following).to(logits.device)] = _CERTAIN
        return taps, logits

    engine.runner.step = step  # type: ignore[method-assign]
    engine.runner.may_run_ahead = lambda *_: False  # type: ignore[method-assign]


class InjectedDraft:
    """A proposer whose blocks cost what `inner`'s cost and are right with a given probability, token by token.

    acceptance: of a token after accepted ones; its confidence too, as a calibrated draft's would be.
    """

    def __init__(self, inner: Any, acceptance: float, seed: int) -> None:
        self._inner, self._acceptance = inner, acceptance
        self._chance = torch.Generator().manual_seed(seed)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def propose(self, sequences: Sequence[Running]) -> Proposal:
        made: Proposal = self._inner.propose(sequences)
        requests, block = made.tokens.shape
        right = said(torch.tensor([[len(s.tokens)] for s in sequences]) + torch.arange(block))
        lucky = torch.rand(requests, block, generator=self._chance) < self._acceptance
        tokens = torch.where(lucky, right, right + 1).to(made.tokens.device)
        confidence = torch.full_like(made.confidence, self._acceptance)
        return dataclasses.replace(made, tokens=tokens, confidence=confidence, logits=None, d2t=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=Path, default=SHAPE, help="a config.json; of the target")
    parser.add_argument("--acceptance", type=float, default=0.8, help="injected, per token of a block")
    parser.add_argument("--block", type=int, default=7)
    parser.add_argument("--draft-layers", type=int, default=5)
    parser.add_argument("--draft-vocabulary", type=int, default=0, help="0: the target's")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--threads", type=int, default=EngineConfig().threads)
    parser.add_argument("--levels", default="1,4,16,64", help="concurrent requests")
    parser.add_argument("--passes", type=int, default=4)
    parser.add_argument("--requests-per-user", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bootstrap", type=int, default=2000, help="resamples of an interval")
    parser.add_argument("--json", type=Path, help="also write the results here")
    args = parser.parse_args()
    args.temperature = 0.0
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(
            f"--device {args.device}: torch sees no CUDA device here. --device cpu takes --shape of a small model."
        )
    if not 0 <= args.acceptance <= 1:
        parser.error(f"--acceptance {args.acceptance} is no probability.")
    levels = sorted({int(n) for n in args.levels.split(",")})
    target = random_target(args.shape, getattr(torch, args.dtype), args.device)
    layers = target.num_layers
    taps = [round(1 + i * (layers - 4) / 4) for i in range(5)] if layers > 8 else [0, layers - 1]
    asked = DraftConfig(
        block_size=args.block,
        num_layers=args.draft_layers,
        target_layer_ids=taps,
        draft_vocab_size=args.draft_vocabulary,
    )
    config = resolve(asked, target.config, target.vocab_size - 1)
    draft = make_draft(config, target, torch.arange(args.draft_vocabulary or target.vocab_size))
    draft = draft.to(args.device, target.dtype)
    sizes = EngineConfig(
        max_requests=max(levels),
        max_context=args.prompt_tokens + args.max_new_tokens + 16,
        max_queue=2 * max(levels),
        threads=args.threads,
        prefix_cache=False,
    )
    engines = {}
    for arm in ARMS:
        proposer: Any = make_proposer("none")
        if arm.proposer == "draft":
            proposer = InjectedDraft(make_proposer("dspark", draft), args.acceptance, args.seed)
        engines[arm.name] = Engine(target, sizes, proposer)
        inject_text(engines[arm.name])
    chance = np.random.default_rng(args.seed)
    count = args.passes * max(levels) * args.requests_per_user
    prompts = chance.integers(10, 300, (count, args.prompt_tokens)).tolist()
    done = load.measure(engines, list(ARMS), levels, prompts, args)
    results = load.summaries(done, args)
    print(f"\n{target.identity.id}, random weights; acceptance of {args.acceptance} a token is INJECTED")
    load.show(results)
    if args.json:
        hardware = device_name(args.device)
        report = {"acceptance": "injected", "settings": settings(args), "hardware": hardware, "results": results}
        write_json(args.json, rounded(report))


if __name__ == "__main__":
    main()
