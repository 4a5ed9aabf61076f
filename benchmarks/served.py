"""What comparisons of decoding share: a mix of prompts, and a target, an engine and a draft from the command line."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import EngineConfig, TargetConfig
from pipeline.corpus.conversations import Message
from pipeline.corpus.rows import ChatFormat
from pipeline.drafts.base import Draft
from pipeline.drafts.checkpoint import load_draft
from pipeline.target import Target, load_target

CORPUS = Path(__file__).parents[1] / "pipeline/corpus/demo/prompts.jsonl"
MIX = {
    "chat": ("chat", "explanation", "writing", "rewriting", "lists", "facts", "extraction"),
    "math": ("word_problems", "arithmetic"),
    "code": ("code",),
}


def mixed_prompts(target: Target, count: int, seed: int) -> list[list[int]]:
    """Token ids of `count` prompts of the demo corpus: chat, math and code in turn, each drawn at random."""
    rows = [json.loads(line) for line in CORPUS.read_text().splitlines()]
    chance = np.random.default_rng(seed)
    kinds = [[r["prompt"] for r in rows if r["category"] in names] for names in MIX.values()]
    orders = [chance.permutation(len(texts)) for texts in kinds]
    chat = ChatFormat(target.tokenizer)
    picked = []
    for i in range(count):
        texts, order = kinds[i % len(kinds)], orders[i % len(kinds)]
        picked.append(chat.prompt_ids([Message("user", texts[order[i // len(kinds) % len(order)]])]))
    return picked


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every comparison of decoding."""
    parser.add_argument("--draft", type=Path, help="a draft artifact, as the demo makes in outputs/demo/calibrated")
    parser.add_argument("--target", default=TargetConfig().path, help="target.path")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=EngineConfig().threads)
    parser.add_argument("--cache", type=Path, default=Path(".cache/draftline"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bootstrap", type=int, default=2000, help="resamples of an interval")
    parser.add_argument("--json", type=Path, help="also write the results here")


def load(args: argparse.Namespace) -> Target:
    """The target asked for; an engine takes it over."""
    return load_target(TargetConfig(path=args.target, dtype=args.dtype, device=args.device), args.cache)


def load_drafts(args: argparse.Namespace, target: Target) -> dict[str, Draft]:
    """{"draft": the one asked for}, or nothing. Before an engine takes the target over."""
    return {"draft": load_draft(args.draft, target)} if args.draft else {}


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The options as a report keeps them."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
