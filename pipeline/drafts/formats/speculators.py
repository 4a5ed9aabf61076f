"""Checkpoints of vllm-project/speculators (`DSparkSpeculator`, `DFlashSpeculator`, `Eagle3Speculator`), for vLLM.

The draft's layers are in `transformer_layer_config`. Layer ids count hidden states: `aux_hidden_state_layer_ids` (of
Eagle3 `eagle_aux_hidden_state_layer_ids`) L + 1 is the output of decoder layer L. `sample_from_anchor` states the slot
layout. A reduced vocabulary brings lm_head [Vd, D], `d2t` int64[Vd] (offsets: target id = d + d2t[d]) and `t2d`
bool[V]; otherwise nothing borrowed is in the file. What is the draft's own always is.

A sliding layer's window is written as vLLM and we count it, position by position. The package's own training mask
counts it from the anchor for every slot of the block, so its forward sees up to block_size - 1 positions more.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipeline import artifact
from pipeline.drafts.base import Draft
from pipeline.drafts.formats import eagle3, files, qwen3, vocabulary
from pipeline.drafts.formats.files import Obstacle
from pipeline.errors import ArtifactError, ConfigError
from pipeline.target import Target

VERSION = "0.9.0"
"""The release of speculators whose classes the tests load our files with."""
_ARCHITECTURES = {"dspark": "DSparkSpeculator", "dflash": "DFlashSpeculator", "eagle3": "Eagle3Speculator"}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "dflash": {"sample_from_anchor": False},
    "dspark": {"sample_from_anchor": True, "markov_rank": 256, "enable_confidence_head": True},
}


def recognises(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is of this format."""
    return "speculators_model_type" in raw


def obstacles(draft: Draft) -> list[Obstacle]:
    """Why a draft can't be written in this format; empty if it can."""
    return eagle3.obstacles(draft) if draft.config.algorithm == "eagle3" else qwen3.obstacles(draft, "speculators")


def write(
    draft: Draft,
    target: Target,
    out: Path | str,
    *,
    inputs: dict[str, str],
    settings: Mapping[str, Any] | None = None,
    texts: Mapping[str, str] | None = None,
    served_target: str = "",
) -> artifact.Manifest:
    """Writes a draft as an artifact of kind "export" (see `files.save`).

    Args:
        served_target: hub id or path by which the package and vLLM find the target; "" takes the identity's.
    Raises:
        ConfigError: the format can't hold this draft (see `obstacles`).
    """
    if why := obstacles(draft):
        raise ConfigError(" ".join(map(str, why)))
    c = draft.config
    config: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[c.algorithm]],
        "speculators_model_type": c.algorithm,
        "speculators_version": VERSION,
        "speculators_config": {
            "algorithm": c.algorithm,
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": c.tokens_per_block}],
            "default_proposal_method": "greedy",
            "verifier": {
                "name_or_path": served_target or target.identity.id,
                "architectures": list(target.model.config.architectures or []),
            },
        },
        "draft_vocab_size": len(draft.d2t),
        "tie_word_embeddings": False,
    }
    ids = [i + 1 for i in c.target_layer_ids]
    if c.algorithm == "eagle3":
        config |= {
            "transformer_layer_config": eagle3.settings_of(draft, target),
            "eagle_aux_hidden_state_layer_ids": ids,
            "target_hidden_size": c.hidden_size,
            "norm_before_residual": c.norm_before_residual,
            "norm_before_fc": False,
            "fc_norm": False,
            "norm_output": False,
            "embed_requires_grad": c.own_embedding,
        }
        # The package leaves an embedding that the file lacks uninitialised.
        tensors = eagle3.tensors_of(draft) | {files.EMBED: draft.embed}
    else:
        config |= {
            "transformer_layer_config": qwen3.settings_of(draft, target),
            "aux_hidden_state_layer_ids": ids,
            "block_size": c.block_size,
            "mask_token_id": c.mask_token_id,
            "sample_from_anchor": c.sample_from_anchor,
            # Always: our blocks attend both ways in every layer, and vLLM derives the causality of all layers from it.
            "sliding_window_non_causal": True,
        }
        tensors = files.tensors_of(draft)
    if c.algorithm == "dspark":
        config |= {"confidence_head_with_markov": False, **files.heads_of(c)}
    if not files.full_vocabulary(draft):
        tensors |= {files.LM_HEAD: draft.lm_rows, **vocabulary.tensors_of(draft.d2t, target.vocab_size)}
    return files.save(
        out, draft, target, tensors, config, project="speculators", inputs=inputs, settings=settings, texts=texts
    )


def read(path: Path | str, target: Target) -> Draft:
    """Reads a checkpoint for a target.

    Temperatures are ones unless `temperatures.json` lies beside it.

    Raises:
        ArtifactError: another model type, or fields, vocabulary or tensors that don't fit the target; the message lists
            every difference.
    """
    path = Path(path)
    raw, tensors = files.load(path, "speculators")
    algorithm = raw.get("speculators_model_type")
    if algorithm not in _ARCHITECTURES:
        raise ArtifactError(
            f"{path} has speculators_model_type {algorithm!r}; this reads {' and '.join(_ARCHITECTURES)}."
        )
    if algorithm == "eagle3":
        return _read_eagle3(path, raw, tensors, target)
    known = {**_DEFAULTS[algorithm], **{k: v for k, v in raw.items() if v is not None}}
    ids = known.get("aux_hidden_state_layer_ids")
    size = known.get("draft_vocab_size")
    fields = {
        "block_size": known.get("block_size"),
        "mask_token_id": known.get("mask_token_id"),
        "target_layer_ids": [i - 1 for i in files.present(path, ids, "aux_hidden_state_layer_ids")],
        "draft_vocab_size": size if size is None or size != target.vocab_size else 0,
        "sample_from_anchor": bool(known["sample_from_anchor"]),
    }
    layers = known.get("transformer_layer_config") or {}
    if any(kind == "sliding_attention" for kind in layers.get("layer_types") or []) and not known.get(
        "sliding_window_non_causal", False
    ):
        raise ArtifactError(
            f"{path} has sliding_window_non_causal=false: its sliding layers see only earlier slots of their block, "
            "which this version does not compute."
        )
    heads = files.heads_from(known if algorithm == "dspark" else {})
    config = qwen3.config_from(path, layers, fields | heads, target, algorithm=algorithm)
    if not config.draft_vocab_size:
        kept = {n: t for n, t in tensors.items() if n not in ("d2t", "t2d")}
        return files.build(path, config, target, kept, optional=(files.EMBED, files.LM_HEAD))
    d2t = vocabulary.read(path, tensors, config.draft_vocab_size, target.vocab_size)
    kept = {n: t for n, t in tensors.items() if n not in ("d2t", "t2d")}
    return files.build(path, config, target, kept, d2t=d2t, required=(files.LM_HEAD,), optional=(files.EMBED,))


def _read_eagle3(path: Path, raw: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], target: Target) -> Draft:
    others = [n for n in ("norm_before_fc", "fc_norm", "norm_output") if raw.get(n)]
    if others:
        raise ArtifactError(f"{path} has {', '.join(others)}, which this version's Eagle3 does not compute.")
    ids = files.present(path, raw.get("eagle_aux_hidden_state_layer_ids"), "eagle_aux_hidden_state_layer_ids")
    methods = (raw.get("speculators_config") or {}).get("proposal_methods") or [{}]
    size = raw.get("draft_vocab_size") or target.vocab_size
    reduced = size != target.vocab_size
    return eagle3.read(
        path,
        {"model_type": "qwen3", **(raw.get("transformer_layer_config") or {})},
        {n: t for n, t in tensors.items() if n not in ("d2t", "t2d")},
        target,
        layer_ids=[i - 1 for i in ids],
        steps=int(methods[0].get("speculative_tokens") or eagle3.STEPS),
        d2t=vocabulary.read(path, tensors, size, target.vocab_size) if reduced else None,
        norm_before_residual=bool(raw.get("norm_before_residual")),
    )
