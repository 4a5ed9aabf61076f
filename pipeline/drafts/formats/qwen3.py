"""What the projects' checkpoints have in common: a Qwen3-shaped block drafter in one bfloat16 safetensors file.

Tensor names carry no `model.` prefix and are ours but for d2t and temperatures. Calibration is no part of any of the
formats: `temperatures.json` beside the weights holds it, in the form that SGLang reads.
Letters: V target vocabulary rows, Vd draft vocabulary, D hidden, G tokens per block.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pipeline import artifact
from pipeline.drafts.base import Draft
from pipeline.drafts.checkpoint import differences, make_draft
from pipeline.drafts.config import DraftConfig, check
from pipeline.errors import ArtifactError, ConfigError
from pipeline.target import Target

WEIGHTS, CONFIG, TEMPERATURES = "model.safetensors", "config.json", "temperatures.json"
EMBED, LM_HEAD = "embed_tokens.weight", "lm_head.weight"
_FIELDS = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "hidden_size": "hidden_size",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "rms_norm_eps": "rms_norm_eps",
}
_FIXED = {"attention_bias": False, "hidden_act": "silu"}


@dataclasses.dataclass(frozen=True)
class Obstacle:
    """Why a draft does not fit a format or an engine.

    settings: what to train a draft with that does (`draft.qk_norm` -> "true"); empty where no setting helps.
    """

    why: str
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        wanted = " ".join(f"{k}={v}" for k, v in self.settings.items())
        return self.why + (f" Train it with {wanted}." if wanted else "")


def obstacles(draft: Draft, project: str) -> list[Obstacle]:
    """What of a draft the Qwen3 shape can't hold, in the files of any of the projects."""
    c, found = draft.config, []
    if not c.qk_norm:
        found.append(
            Obstacle(
                f"{project}'s Qwen3-shaped drafts have QK norm; this one has none.",
                {"draft.qk_norm": "true", "trainer.warm_start.layers": "target"},
            )
        )
    if draft.embed_scale != 1.0 or draft.logit_softcap:
        found.append(
            Obstacle(
                f"The target scales its embeddings by {draft.embed_scale:g} and caps its logits at "
                f"{draft.logit_softcap}; the Qwen3 shape does neither, and this version writes no other."
            )
        )
    if len(windows := {w for w in c.sliding_windows if w}) > 1:
        widest = max(windows)
        found.append(
            Obstacle(
                f"The format has one window for all sliding layers; the draft has sliding_windows={c.sliding_windows}.",
                {"draft.sliding_windows": f"[{','.join(str(widest if w else 0) for w in c.sliding_windows)}]"},
            )
        )
    return found


def full_vocabulary(draft: Draft) -> bool:
    """Whether the draft proposes every token of its target."""
    return len(draft.d2t) == draft.embed.shape[0]


def settings_of(draft: Draft, target: Target) -> dict[str, Any]:
    """The fields of a Qwen3 config (as transformers reads them) that describe a draft's layers."""
    c = draft.config
    window = max(c.sliding_windows, default=0)
    return {
        "model_type": "qwen3",
        **{theirs: getattr(c, ours) for ours, theirs in _FIELDS.items()},
        **_FIXED,
        # Engines on transformers 4 read the first, those on 5 the second.
        "rope_theta": c.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "vocab_size": draft.embed.shape[0],
        "max_position_embeddings": int(target.config.max_position_embeddings),
        "layer_types": ["sliding_attention" if c.window(i) else "full_attention" for i in range(c.num_layers)],
        "use_sliding_window": window > 0,
        "sliding_window": window or None,
        "tie_word_embeddings": False,
    }


def heads_of(c: DraftConfig) -> dict[str, Any]:
    """The fields of DSpark's two heads, named alike by all projects."""
    fields: dict[str, Any] = {
        "markov_rank": c.markov_rank if c.has_markov else 0,
        "enable_confidence_head": c.enable_confidence_head,
    }
    if c.has_markov:
        fields["markov_head_type"] = c.markov_head_type
    if c.enable_confidence_head:
        fields["confidence_head_with_markov"] = c.has_markov and c.confidence_head_with_markov
    return fields


def tensors_of(draft: Draft) -> dict[str, torch.Tensor]:
    """The draft's own weights by name, nothing borrowed."""
    return {n: t for n, t in draft.trainable_state().items() if n not in ("d2t", "temperatures")}


def save(
    out: Path | str,
    draft: Draft,
    target: Target,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    *,
    project: str,
    inputs: dict[str, str],
    settings: Mapping[str, Any] | None = None,
    files: Mapping[str, str] | None = None,
) -> artifact.Manifest:
    """Writes a checkpoint directory as an artifact of kind "export", aside, and renames it whole.

    Args:
        tensors: what goes into the weights; floating-point ones as bfloat16.
        settings, inputs: of the stage, for the manifest. files: texts to put beside the weights, by name.
    """
    with artifact.create(
        out,
        "export",
        config={"format": project, **(settings or {})},
        inputs=inputs,
        target=target.identity.as_dict(),
    ) as staging:
        # Tied matrices share memory, which safetensors refuses to write.
        save_file(
            {
                n: t.detach().to("cpu", torch.bfloat16 if t.is_floating_point() else t.dtype).contiguous().clone()
                for n, t in tensors.items()
            },
            staging.path / WEIGHTS,
            metadata={"format": "pt"},
        )
        # safetensors makes it readable to its owner alone; an engine may run as somebody else.
        (staging.path / WEIGHTS).chmod(0o644)
        artifact.write_json(staging.path / CONFIG, {**config, "dtype": "bfloat16"})
        artifact.write_json(staging.path / TEMPERATURES, {"temperatures": draft.temperatures.tolist()})
        for name, text in (files or {}).items():
            (staging.path / name).write_text(text)
        staging.counts["parameters"] = sum(t.numel() for t in tensors.values() if t.is_floating_point())
    return artifact.load(out, "export", verify=False)


def load(path: Path, project: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """config.json and the tensors of a checkpoint directory.

    Raises:
        ArtifactError: a file is missing or can't be read.
    """
    try:
        raw = json.loads((path / CONFIG).read_text())
        if not isinstance(raw, dict):
            raise ValueError(f"{CONFIG} holds no object")
        return raw, load_file(path / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as e:
        raise ArtifactError(f"{path} is not a {project} checkpoint that can be read: {e}") from None


def architecture(path: Path, raw: Mapping[str, Any], known: Mapping[str, str]) -> str:
    """The algorithm of a checkpoint, from its first architecture.

    Args:
        known: architecture -> algorithm.
    Raises:
        ArtifactError: another architecture.
    """
    name = (raw.get("architectures") or ["none"])[0]
    if name not in known:
        raise ArtifactError(f"{path} is a {name}; this reads {' and '.join(known)}.")
    return known[name]


def config_from(
    path: Path, layers: Mapping[str, Any], fields: Mapping[str, Any], target: Target, *, algorithm: str
) -> DraftConfig:
    """The draft's config.

    Args:
        layers: the Qwen3 fields of config.json, wherever the format keeps them.
        fields: our other fields with the file's values; None where the file has none, which is an error.
    Raises:
        ArtifactError: fields that are missing, that this version does not compute, or that don't fit the target; the
            message lists every one.
    """
    rope = layers.get("rope_parameters") or layers.get("rope_scaling") or {}
    theta = layers.get("rope_theta") or rope.get("rope_theta")
    missing = [theirs for theirs in _FIELDS.values() if layers.get(theirs) is None]
    missing += ["rope_theta"] if theta is None else []
    missing += [name for name, value in fields.items() if value is None]
    if missing:
        raise ArtifactError(f"{path / CONFIG} has no {', '.join(missing)}.")
    problems = [
        f"{name} is {layers[name]!r}, this version computes {value!r}"
        for name, value in _FIXED.items()
        if layers.get(name, value) != value
    ]
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        problems.append(f"rope_type is {kind!r}, this version computes 'default'")
    for name, mine in (("vocab_size", target.vocab_size), ("num_target_layers", target.num_layers)):
        if (theirs := layers.get(name, mine)) != mine:
            problems.append(f"{name} is {theirs}, the target's is {mine}")
    types = layers.get("layer_types") or []
    unknown = sorted(set(types) - {"full_attention", "sliding_attention"})
    if unknown:
        problems.append(f"layer_types has {', '.join(map(repr, unknown))}, this version computes full and sliding")
    windows = [int(layers.get("sliding_window") or 0) if kind == "sliding_attention" else 0 for kind in types]
    if any(kind == "sliding_attention" and not w for kind, w in zip(types, windows, strict=True)):
        problems.append("layer_types has sliding_attention, but there is no sliding_window")
    config = DraftConfig(
        algorithm=algorithm,
        **{ours: layers[theirs] for ours, theirs in _FIELDS.items()},
        rope_theta=float(theta),  # type: ignore[arg-type]
        sliding_windows=windows if any(windows) else [],
        **{"qk_norm": True, **fields},
    )
    try:
        check(config, target.hidden_size, target.vocab_size, target.num_layers)
    except ConfigError as e:
        problems.append(str(e).rstrip("."))
    if problems:
        raise ArtifactError(f"The draft at {path} does not fit the target: " + "; ".join(problems) + ".")
    return config


def heads_from(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Our fields of the two heads; `raw` is where the format keeps them."""
    rank = int(raw.get("markov_rank") or 0)
    return {
        "markov_rank": rank,
        "markov_head_type": str(raw.get("markov_head_type") or "vanilla") if rank else "none",
        "enable_confidence_head": bool(raw.get("enable_confidence_head", False)),
        "confidence_head_with_markov": bool(raw.get("confidence_head_with_markov", rank > 0)),
    }


def build(
    path: Path,
    config: DraftConfig,
    target: Target,
    tensors: Mapping[str, torch.Tensor],
    *,
    d2t: torch.Tensor | None = None,
    required: tuple[str, ...] = (),
    optional: tuple[str, ...] = (),
) -> Draft:
    """The draft with a file's weights, ready to run on the target's device.

    Args:
        d2t: int64[Vd], ascending target ids; None for the whole vocabulary.
        required, optional: which of the target's matrices the file must, or may, hold. They must be the target's.
    Raises:
        ArtifactError: names, shapes, values or borrowed matrices differ; the message lists every difference.
    """
    draft = make_draft(config, target, torch.arange(target.vocab_size) if d2t is None else d2t)
    own = {n: t for n, t in draft.state_dict().items() if n not in ("d2t", "temperatures")}
    borrowed = {EMBED: draft.embed, LM_HEAD: draft.lm_rows}
    borrowed = {n: t for n, t in borrowed.items() if n in required or (n in optional and n in tensors)}
    problems = differences(tensors, own | borrowed)
    for name, mine in borrowed.items():
        theirs = tensors.get(name)
        if theirs is not None and theirs.shape == mine.shape and not torch.equal(theirs, mine.to("cpu", theirs.dtype)):
            far = float((theirs.float() - mine.float().cpu()).abs().max())
            problems.append(f"{name} is not the target's (up to {far:.3g} apart)")
    temperatures = _temperatures(path, config.tokens_per_block, problems)
    if problems:
        raise ArtifactError(f"The draft at {path} does not match: " + "; ".join(sorted(problems)) + ".")
    draft.load_state_dict({n: tensors[n].float() for n in own}, strict=False)
    if temperatures is not None:
        draft.temperatures.copy_(temperatures)
    return draft.to(target.device).eval()


def _temperatures(path: Path, count: int, problems: list[str]) -> torch.Tensor | None:
    """float32[G] from temperatures.json; None without the file."""
    if not (path / TEMPERATURES).is_file():
        return None
    try:
        values = torch.tensor(json.loads((path / TEMPERATURES).read_text())["temperatures"], dtype=torch.float32)
    except (OSError, ValueError, TypeError, KeyError) as e:
        problems.append(f"{TEMPERATURES} can't be read ({type(e).__name__}: {e})")
        return None
    if values.shape != (count,) or not bool((values > 0).all()):
        problems.append(f"{TEMPERATURES} must hold {count} numbers above 0, has {values.tolist()}")
    return values
