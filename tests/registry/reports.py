"""Reports and drafts as the registry sees them: tiny artifacts with the contract's fields."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

from pipeline.artifact import Manifest, create, load

TARGET = {
    "id": "tiny",
    "revision": "r1",
    "weight_digest": "w" * 64,
    "config_digest": "c" * 64,
    "tokenizer_digest": "t" * 64,
}


@dataclasses.dataclass(frozen=True)
class Policy:
    require_exact_greedy: bool = True
    min_speedup_low: float = 1.0
    min_prompts: int = 8
    max_regression: float = 0.05
    min_tau: float = 0.0


def report(speedup: float = 1.5, low: float = 1.45, high: float = 1.55, **changes: Any) -> dict[str, Any]:
    """A report.json that passes the default policy, with some fields changed (None deletes one)."""
    content: dict[str, Any] = {
        "exact_greedy": True,
        "headline": {
            "speedup": speedup,
            "speedup_low": low,
            "speedup_high": high,
            "tau": 2.3,
            "accept_rate": 0.4,
            "verified_accept_rate": 0.5,
            "prompts": 16,
        },
        "target": copy.deepcopy(TARGET),
        "draft_digest": "d" * 64,
        "evaluation_set_digest": "e" * 64,
    }
    for name, value in changes.items():
        if name in content:
            content[name] = value
        else:
            content["headline"][name] = value
    return {k: v for k, v in content.items() if v is not None}


def comparison(ratio: float = 1.0, low: float = 0.97, high: float = 1.03, draft: str = "d" * 64) -> dict[str, Any]:
    """A comparison.json of the challenger `draft` with a champion."""
    sides = {"challenger": {"draft_digest": draft}, "champion": {"draft_digest": "c" * 64}}
    return {"ratio": ratio, "low": low, "high": high, "prompts": 16, **sides}


def make_draft(path: Path, weights: bytes = b"weights", target: dict[str, str] = TARGET) -> Manifest:
    with create(path, "draft", config={"num_layers": 2, "block_size": 7}, target=target) as staging:
        (staging.path / "model.safetensors").write_bytes(weights)
    return load(path, "draft")


def make_report(path: Path, draft: Manifest, **changes: Any) -> Manifest:
    with create(path, "report", config={"prompts": 8}, inputs={"draft": draft.digest}, target=TARGET) as staging:
        content = report(**{"draft_digest": draft.digest, **changes})
        (staging.path / "report.json").write_text(json.dumps(content))
        (staging.path / "report.html").write_text("<html></html>")
    return load(path, "report")
