"""SpecForge's checkpoints (`DSparkDraftModel`, `DFlashDraftModel`, `LlamaForCausalLMEagle3`), which SGLang loads; those
of z-lab's DFlash too.

Of the block drafters nothing borrowed is in the file: SGLang lends the target's embedding and lm_head, so the
vocabulary is the whole one. `dflash_config` holds tapped layers (ids as ours: L is the output of decoder layer L), mask
token and heads. DSpark's slots all predict, in DFlash the anchor's slot predicts nothing: G = block_size, and
block_size - 1. Eagle3 has its layer under `midlayer.`, three tapped layers in `eagle_config` (ids as ours), its rows of
lm_head, and of a reduced vocabulary `d2t` and `t2d` as speculators' files do.
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

_ARCHITECTURES = {"dspark": "DSparkDraftModel", "dflash": "DFlashDraftModel"}
_EAGLE3 = "LlamaForCausalLMEagle3"
_LAYER = "midlayer."


def recognises(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is of this format."""
    return files.first_architecture(raw) in (*_ARCHITECTURES.values(), _EAGLE3)


def obstacles(draft: Draft) -> list[Obstacle]:
    """Why a draft can't be written in this format; empty if it can."""
    c = draft.config
    if c.algorithm == "eagle3":
        found = eagle3.obstacles(draft) + eagle3.taps_obstacle(draft, "SpecForge's Eagle3", 3)
        if c.qk_norm:
            found.append(
                Obstacle(
                    "SpecForge's Eagle3 has Llama's layer, without QK norm; this draft has QK norm.",
                    {"draft.qk_norm": "false"},
                )
            )
        found += files.owned_obstacles(draft, "SpecForge's Eagle3", files.EMBED)
        return found + eagle3.residual_obstacle(draft, "SpecForge's Eagle3")
    found = qwen3.obstacles(draft, "SpecForge")
    found += files.owned_obstacles(draft, "SpecForge's block draft", files.EMBED, files.LM_HEAD)
    if not files.full_vocabulary(draft):
        found.append(
            Obstacle(
                f"SpecForge's block drafts use the target's lm_head of {draft.embed.shape[0]} tokens; this draft "
                f"proposes {len(draft.d2t)} of them.",
                {"draft.draft_vocab_size": "0"},
            )
        )
    if c.algorithm in _ARCHITECTURES and c.sample_from_anchor != (c.algorithm == "dspark"):
        says = "predicts too" if c.algorithm == "dspark" else "predicts nothing"
        found.append(
            Obstacle(
                f"In SpecForge's {c.algorithm} the anchor's slot {says}; this draft has sample_from_anchor="
                f"{str(c.sample_from_anchor).lower()}.",
                {"draft.sample_from_anchor": str(c.algorithm == "dspark").lower()},
            )
        )
    return found


def write(
    draft: Draft,
    target: Target,
    out: Path | str,
    *,
    inputs: dict[str, str],
    settings: Mapping[str, Any] | None = None,
    texts: Mapping[str, str] | None = None,
) -> artifact.Manifest:
    """Writes a draft as an artifact of kind "export" (see `files.save`).

    Raises:
        ConfigError: the format can't hold this draft (see `obstacles`).
    """
    if why := obstacles(draft):
        raise ConfigError(" ".join(map(str, why)))
    c = draft.config
    if c.algorithm == "eagle3":
        return _write_eagle3(draft, target, out, inputs=inputs, settings=settings, texts=texts)
    dflash: dict[str, Any] = {"mask_token_id": c.mask_token_id, "target_layer_ids": c.target_layer_ids}
    config = {
        **qwen3.settings_of(draft, target),
        "architectures": [_ARCHITECTURES[c.algorithm]],
        "num_target_layers": target.num_layers,
        "block_size": c.block_size,
        "dflash_config": dflash,
    }
    if c.algorithm == "dspark":
        heads = files.heads_of(c)
        dflash |= {"projector_type": "dspark", **heads}
        config |= heads  # SGLang builds its heads from the top level
    return files.save(
        out,
        draft,
        target,
        files.tensors_of(draft),
        config,
        project="specforge",
        inputs=inputs,
        settings=settings,
        texts=texts,
    )


def read(path: Path | str, target: Target) -> Draft:
    """Reads a checkpoint for a target.

    Temperatures are ones unless `temperatures.json` lies beside it.

    Raises:
        ArtifactError: another architecture, or fields or tensors that don't fit the target; the message lists every
            difference.
    """
    path = Path(path)
    raw, tensors = files.load(path, "SpecForge")
    algorithm = files.architecture(path, raw, {v: k for k, v in {**_ARCHITECTURES, "eagle3": _EAGLE3}.items()})
    if algorithm == "eagle3":
        return _read_eagle3(path, raw, tensors, target)
    dflash = raw.get("dflash_config") or {}
    twice = [n for n in dflash.keys() & raw.keys() if dflash[n] != raw[n]]
    if twice:
        told = ", ".join(f"{n} is {raw[n]!r} and in dflash_config {dflash[n]!r}" for n in sorted(twice))
        raise ArtifactError(f"{path / files.CONFIG} contradicts itself: {told}.")
    both = {**raw, **dflash}
    projector = both.get("projector_type", algorithm)
    if projector != algorithm:
        raise ArtifactError(f"{path} has projector_type {projector!r}; this reads {algorithm!r} of that architecture.")
    fields = {name: both.get(name) for name in ("block_size", "target_layer_ids", "mask_token_id")}
    heads = files.heads_from(both if algorithm == "dspark" else {})
    config = qwen3.config_from(
        path,
        raw,
        fields | heads | {"sample_from_anchor": algorithm == "dspark"},
        target,
        algorithm=algorithm,
    )
    return files.build(path, config, target, tensors)


def _write_eagle3(
    draft: Draft,
    target: Target,
    out: Path | str,
    *,
    inputs: dict[str, str],
    settings: Mapping[str, Any] | None,
    texts: Mapping[str, str] | None,
) -> artifact.Manifest:
    c = draft.config
    config = {
        **eagle3.settings_of(draft, target),
        "architectures": [_EAGLE3],
        "draft_vocab_size": len(draft.d2t),
        "target_hidden_size": c.hidden_size,
        "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": c.target_layer_ids},
        "ttt_length": c.block_size,
    }
    tensors = eagle3.tensors_of(draft, _LAYER)
    if not files.full_vocabulary(draft):
        tensors |= vocabulary.tensors_of(draft.d2t, target.vocab_size)
    return files.save(
        out, draft, target, tensors, config, project="specforge", inputs=inputs, settings=settings, texts=texts
    )


def _read_eagle3(path: Path, raw: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], target: Target) -> Draft:
    ids = (raw.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    if ids is None:
        n = target.num_layers
        raise ArtifactError(
            f"{path / files.CONFIG} has no eagle_config.eagle_aux_hidden_state_layer_ids. Write there the layers whose "
            f"outputs the draft was trained on; where nothing is said, engines take [1, {n // 2 - 1}, {n - 4}]."
        )
    size = raw.get("draft_vocab_size") or target.vocab_size
    reduced = size != target.vocab_size
    return eagle3.read(
        path,
        raw,
        {n: t for n, t in tensors.items() if n not in ("d2t", "t2d")},
        target,
        layer_ids=ids,
        steps=int(raw.get("ttt_length") or eagle3.STEPS),
        d2t=vocabulary.read(path, tensors, size, target.vocab_size) if reduced else None,
        layer=_LAYER,
    )
