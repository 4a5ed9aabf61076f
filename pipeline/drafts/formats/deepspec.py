"""DeepSpec's checkpoints (MIT; `Qwen3DSparkModel`, `Qwen3DFlashModel`): one safetensors file and a flat config.json.

All tensors are bfloat16, without a `model.` prefix. The target's embedding and lm_head are in the file, full
vocabulary. Layer ids count as ours do: id L is the output of decoder layer L. Slots are DSpark's in both algorithms:
the anchor's slot predicts. Calibration is no part of the format; `temperatures.json` beside it holds what SGLang reads.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pipeline import artifact
from pipeline.drafts.base import Draft
from pipeline.drafts.checkpoint import differences, make_draft
from pipeline.drafts.config import DraftConfig, check
from pipeline.drafts.dspark import DSparkDraft
from pipeline.errors import ArtifactError, ConfigError
from pipeline.target import Target

WEIGHTS, CONFIG, TEMPERATURES = "model.safetensors", "config.json", "temperatures.json"
_ARCHITECTURES = {"dspark": "Qwen3DSparkModel", "dflash": "Qwen3DFlashModel"}
_BORROWED = ("embed_tokens.weight", "lm_head.weight")


def refusal(draft: DSparkDraft) -> str | None:
    """Why a draft can't be written in this format, with the nearest one that can; None if it can."""
    c = draft.config
    if len(draft.d2t) != draft.embed.shape[0]:
        return (
            f"DeepSpec's checkpoints hold the whole vocabulary of {draft.embed.shape[0]} tokens; this draft proposes "
            f"{len(draft.d2t)} of them. Train it with draft.draft_vocab_size=0."
        )
    if not c.qk_norm:
        return "DeepSpec's Qwen3 drafts have QK norm; this one has none. Train it with draft.qk_norm=true."
    if not c.sample_from_anchor:
        return (
            "DeepSpec's slots all predict; in this draft the anchor's slot does not. Train it with "
            "draft.sample_from_anchor=true."
        )
    if any(c.sliding_windows):
        return (
            f"This version writes full attention only; the draft has sliding_windows={c.sliding_windows}. Train it "
            "with draft.sliding_windows=[]."
        )
    return None


def write(draft: DSparkDraft, target: Target, out: Path | str, *, inputs: dict[str, str]) -> artifact.Manifest:
    """Writes a draft as an artifact of kind "export".

    Args:
        inputs: digests of what it was made from, for the manifest.
    Raises:
        ConfigError: the format can't hold this draft (see `refusal`).
    """
    if (why := refusal(draft)) is not None:
        raise ConfigError(why)
    c = draft.config
    tensors = {n: t for n, t in draft.trainable_state().items() if n not in ("d2t", "temperatures")}
    tensors |= dict(zip(_BORROWED, (draft.embed, draft.lm_rows), strict=True))
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[c.algorithm]],
        "model_type": "qwen3",
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_theta,
        "vocab_size": draft.embed.shape[0],
        "max_position_embeddings": int(target.config.max_position_embeddings),
        "layer_types": ["full_attention"] * c.num_layers,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
        "num_target_layers": target.num_layers,
        "target_layer_ids": c.target_layer_ids,
        "block_size": c.block_size,
        "mask_token_id": c.mask_token_id,
        "markov_rank": c.markov_rank if c.has_markov else 0,
        "enable_confidence_head": c.enable_confidence_head,
    }
    if c.has_markov:
        config["markov_head_type"] = c.markov_head_type
    if c.enable_confidence_head:
        config["confidence_head_with_markov"] = c.confidence_head_with_markov
    with artifact.create(
        out, "export", config={"format": "deepspec"}, inputs=inputs, target=target.identity.as_dict()
    ) as staging:
        # Tied matrices share memory, which safetensors refuses to write.
        save_file(
            {n: t.detach().to("cpu", torch.bfloat16).contiguous().clone() for n, t in tensors.items()},
            staging.path / WEIGHTS,
        )
        artifact.write_json(staging.path / CONFIG, config)
        artifact.write_json(staging.path / TEMPERATURES, {"temperatures": draft.temperatures.tolist()})
    return artifact.load(out, "export", verify=False)


def read(path: Path | str, target: Target) -> Draft:
    """Reads a DSpark or DFlash checkpoint for a target.

    Temperatures are ones unless `temperatures.json` lies beside it.

    Raises:
        ArtifactError: another architecture, or tensors that don't fit it or the target; the message lists every
            difference.
    """
    path = Path(path)
    try:
        raw = json.loads((path / CONFIG).read_text())
        tensors = load_file(path / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as e:
        raise ArtifactError(f"{path} is not a DeepSpec checkpoint that can be read: {e}") from None
    names = {v: k for k, v in _ARCHITECTURES.items()}
    architecture = (raw.get("architectures") or ["none"])[0]
    if architecture not in names:
        raise ArtifactError(f"{path} is a {architecture}; this reads {' and '.join(names)}.")
    config = _config(path, names[architecture], raw)
    try:
        check(config, target.hidden_size, target.vocab_size, target.num_layers)
    except ConfigError as e:
        raise ArtifactError(f"The draft at {path} does not fit the target. {e}") from None
    draft = make_draft(config, target, torch.arange(target.vocab_size))
    own = {n: t for n, t in draft.state_dict().items() if n not in ("d2t", "temperatures")}
    borrowed = dict(zip(_BORROWED, (draft.embed, draft.lm_rows), strict=True))
    problems = differences(tensors, own | {n: t for n, t in borrowed.items() if n in tensors})
    for name, mine in borrowed.items():
        theirs = tensors.get(name)
        if theirs is not None and theirs.shape == mine.shape and not torch.equal(theirs, mine.to(theirs.dtype)):
            far = float((theirs.float() - mine.float()).abs().max())
            problems.append(f"{name} is not the target's (up to {far:.3g} apart)")
    if problems:
        raise ArtifactError(f"The draft at {path} does not match: " + "; ".join(sorted(problems)) + ".")
    draft.load_state_dict({n: tensors[n].float() for n in own}, strict=False)
    if (path / TEMPERATURES).is_file():
        draft.temperatures.copy_(torch.tensor(json.loads((path / TEMPERATURES).read_text())["temperatures"]))
    return draft.to(target.device).eval()


def _config(path: Path, algorithm: str, raw: dict[str, Any]) -> DraftConfig:
    if any(kind != "full_attention" for kind in raw.get("layer_types", [])):
        raise ArtifactError(f"{path} has layer_types {raw['layer_types']}; this version reads full attention only.")
    rank = int(raw.get("markov_rank") or 0)
    wanted = {
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "num_kv_heads": "num_key_value_heads",
        "hidden_size": "hidden_size",
        "head_dim": "head_dim",
        "intermediate_size": "intermediate_size",
        "rms_norm_eps": "rms_norm_eps",
        "block_size": "block_size",
        "target_layer_ids": "target_layer_ids",
        "mask_token_id": "mask_token_id",
    }
    missing = [theirs for theirs in wanted.values() if theirs not in raw]
    theta = raw.get("rope_theta") or (raw.get("rope_parameters") or {}).get("rope_theta")
    if theta is None or missing:
        missing += ["rope_theta"] if theta is None else []
        raise ArtifactError(f"{path / CONFIG} has no {', '.join(missing)}.")
    return dataclasses.replace(
        DraftConfig(**{ours: raw[theirs] for ours, theirs in wanted.items()}),
        algorithm=algorithm,
        rope_theta=float(theta),
        qk_norm=True,
        markov_rank=rank,
        markov_head_type=raw.get("markov_head_type", "vanilla") if rank else "none",
        enable_confidence_head=bool(raw.get("enable_confidence_head", False)),
        confidence_head_with_markov=bool(raw.get("confidence_head_with_markov", rank > 0)),
    )
