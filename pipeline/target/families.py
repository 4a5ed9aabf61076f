"""One adapter per family of targets: where its embedding, layers, final norm and lm_head live, and what a draft that
borrows them inherits.

Who scales: `embed_tokens.weight` and `lm_head.weight` are as stored in every family. Gemma's embedding *module*
multiplies its rows by sqrt(D) on the way out, and its model caps logits behind lm_head; code that indexes the weights,
as drafts do, has to apply `embed_scale` and `logit_softcap` itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pipeline.errors import DraftlineError


@dataclasses.dataclass(frozen=True)
class Family:
    """The parts of a causal language model.

    Attributes:
        name: transformers' model_type.
        backbone: the text model, embedding to final norm, no lm_head; takes input_ids.
        layers: decoder layers; the output of one is [B, S, D], or [B, S, streams, D].
        embed_scale: factor on rows of `embed_tokens.weight`, rounded to the weight's dtype as the target does (1
            except in Gemma).
        logit_softcap: c in c * tanh(logits / c), or None.
        placeholders: ids that stand for images or sound in a multimodal target; without any they read as `blank`, as
            the target itself reads them, so that a stray one in a text means the same here.
        streams: parallel residual streams of a position (hyper-connections); a tap is their mean, which is what the
            engines that serve such targets give their drafts.
        norm_offset: added to `final_norm.weight` (1 where the family stores gains around 0).
        layer_obstacle: why a draft's layers can't start as copies of the target's, or None.
        engine_obstacle: why the decoding engine can't run the family, or None.
    """

    name: str
    backbone: nn.Module
    embed_tokens: nn.Embedding
    layers: nn.ModuleList
    final_norm: nn.Module
    lm_head: nn.Module
    embed_scale: float = 1.0
    logit_softcap: float | None = None
    placeholders: tuple[int, ...] = ()
    blank: int = 0
    streams: int = 1
    norm_offset: float = 0.0
    layer_obstacle: str | None = None
    engine_obstacle: str | None = None

    def hidden(self, input_ids: torch.Tensor, **options: Any) -> torch.Tensor:
        """last_hidden [B, S, D] of int64 input_ids [B, S], after the final norm; no transformers cache is used.

        Args:
            options: passed to the backbone (position_ids, what attention functions take).
        """
        if self.placeholders:
            # One by one: a tensor of them would be copied to the device, which a CUDA graph can't do.
            for stray in self.placeholders:
                input_ids = input_ids.masked_fill(input_ids == stray, self.blank)
        out: torch.Tensor = self.backbone(input_ids=input_ids, use_cache=False, **options).last_hidden_state
        return out

    @property
    def final_norm_gain(self) -> torch.Tensor:
        """float[D]: what the final norm multiplies a normalised vector by."""
        return self.final_norm.get_parameter("weight").detach() + self.norm_offset


def _plain(model: Any) -> Family:
    return _parts(model, model.model)


def _biased(model: Any) -> Family:
    obstacle = "its projections add biases, and a draft's have none"
    return dataclasses.replace(_plain(model), layer_obstacle=obstacle)


def _gemma(model: Any) -> Family:
    """Gemma 2, 3 and 4, text models and the text part of multimodal ones.

    Per-layer input embeddings, keys shared between layers and one projection for keys and values stay inside the
    backbone; taps and last_hidden are the same [B, S, D] as elsewhere.
    """
    backbone = getattr(model.model, "language_model", model.model)
    config = backbone.config
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        raise DraftlineError(
            f"The target ({model.config.model_type}) attends in both directions "
            f"(use_bidirectional_attention={config.use_bidirectional_attention!r}); a target must be causal. Choose a "
            "checkpoint that generates text."
        )
    embed = backbone.embed_tokens
    four = "gemma4" in config.model_type
    names = ("image_token_id", "video_token_id", "audio_token_id") if four and backbone is not model.model else ()
    return dataclasses.replace(
        _parts(model, backbone),
        placeholders=tuple(i for n in names if (i := getattr(model.config, n, None)) is not None),
        blank=config.pad_token_id or 0,
        embed_scale=float(torch.tensor(embed.scalar_embed_scale, dtype=embed.weight.dtype, device="cpu")),
        # transformers' multimodal Gemma 3 leaves the cap out, whatever its config says.
        logit_softcap=None if model.config.model_type == "gemma3" else config.final_logit_softcapping or None,
        norm_offset=0.0 if four else 1.0,
        layer_obstacle="its layers normalise what attention and MLP give back, and use GELU; "
        + ("a draft's with draft.layer_family=gemma4 do too, but start untrained" if four else "a draft's do neither"),
    )


ENGINE_OBSTACLES = {
    "deepseek_v4": (
        "beside keys and values its layers keep compressed entries over a running window, which can't be taken back "
        "when drafted tokens are rejected, and its attention has sinks; that would need a cache of its own with a "
        "snapshot per step"
    )
}
"""Why the decoding engine can't run a family, by model_type."""


def _deepseek_v4(model: Any) -> Family:
    return dataclasses.replace(
        _parts(model, model.model),
        streams=int(model.config.hc_mult),
        layer_obstacle="its layers mix several residual streams around low-rank attention; a draft's are plain",
        engine_obstacle=ENGINE_OBSTACLES["deepseek_v4"],
    )


def _parts(model: Any, backbone: Any) -> Family:
    return Family(
        model.config.model_type, backbone, backbone.embed_tokens, backbone.layers, backbone.norm, model.lm_head
    )


ADAPTERS: dict[str, Callable[[Any], Family]] = {
    "deepseek_v4": _deepseek_v4,
    "gemma2": _gemma,
    "gemma3": _gemma,
    "gemma3_text": _gemma,
    "gemma4": _gemma,
    "gemma4_text": _gemma,
    "gemma4_unified": _gemma,
    "gemma4_unified_text": _gemma,
    "llama": _plain,
    "mistral": _plain,
    "qwen2": _biased,
    "qwen3": _plain,
    "qwen3_moe": _plain,
}

_NEAR_MISSES = {
    "gemma3n": "its layers pass four AltUp streams that are merged by learned predictions, so that no layer output is "
    "the residual stream; a tap would have to run that merge",
}


def check_family(kind: str) -> None:
    """Raises DraftlineError for a model_type without an adapter, with the reason where one is known."""
    if kind in ADAPTERS:
        return
    why = next((f" Of this one: {reason}." for name, reason in _NEAR_MISSES.items() if kind.startswith(name)), "")
    raise DraftlineError(
        f"The target's model_type is {kind!r}; supported are {', '.join(ADAPTERS)}.{why} "
        "A family is added in pipeline/target/families.py."
    )


def family_of(model: Any) -> Family:
    """The adapter of a loaded transformers model.

    Raises:
        DraftlineError: a family that is not supported, or a checkpoint of one that is not causal.
    """
    check_family(model.config.model_type)
    return ADAPTERS[model.config.model_type](model)
