"""What the projects' checkpoint files have in common, whatever the shape of a draft's layers: one bfloat16 safetensors
file and a config.json.

Tensor names carry no `model.` prefix and are ours but for d2t, temperatures, embedding and lm_head. Calibration is no
part of any of the formats: `temperatures.json` beside the weights holds it, in the form that SGLang reads.
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
_NAMES = {"embed": EMBED, "lm_rows": LM_HEAD}  # ours -> the files'


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


def full_vocabulary(draft: Draft) -> bool:
    """Whether the draft proposes every token of its target."""
    return len(draft.d2t) == draft.embed.shape[0]


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
    kept = {n: t for n, t in draft.trainable_state().items() if n not in ("d2t", "temperatures")}
    return {_NAMES.get(n, n): t for n, t in kept.items()}


def owned(draft: Draft) -> dict[str, str]:
    """Of the matrices that a draft may borrow those that are its own, with the setting that says so."""
    c = draft.config
    found = {EMBED: "draft.own_embedding"} if c.own_embedding else {}
    return found | ({LM_HEAD: "draft.own_lm_head"} if c.own_lm_head else {})


def owned_obstacles(draft: Draft, who: str, *matrices: str) -> list[Obstacle]:
    """That a format or engine has no place for matrices of the draft's own, if the draft has them."""
    mine = {n: key for n, key in owned(draft).items() if n in matrices}
    if not mine:
        return []
    names = " and ".join(n.removesuffix(".weight") for n in mine)
    return [
        Obstacle(f"{who} takes the target's {names}; this draft has its own.", dict.fromkeys(mine.values(), "false"))
    ]


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
    texts: Mapping[str, str] | None = None,
) -> artifact.Manifest:
    """Writes a checkpoint directory as an artifact of kind "export", aside, and renames it whole.

    Args:
        tensors: what goes into the weights; floating-point ones as bfloat16.
        settings, inputs: of the stage, for the manifest. texts: files to put beside the weights, by name.
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
        for name, text in (texts or {}).items():
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


def first_architecture(raw: Mapping[str, Any]) -> str:
    """What a config.json calls its model; "none" if it does not say."""
    return (raw.get("architectures") or ["none"])[0]


def architecture(path: Path, raw: Mapping[str, Any], known: Mapping[str, str]) -> str:
    """The algorithm of a checkpoint, from its first architecture.

    Args:
        known: architecture -> algorithm.
    Raises:
        ArtifactError: another architecture.
    """
    name = first_architecture(raw)
    if name not in known:
        raise ArtifactError(f"{path} is a {name}; this reads {' and '.join(known)}.")
    return known[name]


def present(path: Path, value: Any, key: str) -> Any:
    """A value of config.json that must be there.

    Raises:
        ArtifactError: it is None.
    """
    if value is None:
        raise ArtifactError(f"{path / CONFIG} has no {key}.")
    return value


def checked(path: Path, config: DraftConfig, target: Target, problems: list[str]) -> DraftConfig:
    """A config that was read, if it fits.

    Args:
        problems: what was found already; filled further.
    Raises:
        ArtifactError: fields that this version does not compute or that don't fit the target; lists every one.
    """
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
        required, optional: which of embedding and lm_head the file must, or may, hold. One that is not the target's is
            the draft's own.
    Raises:
        ArtifactError: names, shapes or values differ; the message lists every difference.
    """
    ids = torch.arange(target.vocab_size) if d2t is None else d2t
    draft = make_draft(config, target, ids)
    matrices = {EMBED: draft.embed, LM_HEAD: draft.lm_rows}
    known = (*required, *optional)
    apart = {n: n in known and n in tensors and _differs(tensors[n], mine) for n, mine in matrices.items()}
    if any(apart.values()):
        config = dataclasses.replace(config, own_embedding=apart[EMBED], own_lm_head=apart[LM_HEAD])
        draft = make_draft(config, target, ids)
    expected = tensors_of(draft)
    held = {n: t for n, t in matrices.items() if n in required or (n in optional and n in tensors)}
    problems = differences(tensors, held | expected)
    temperatures = _temperatures(path, config.tokens_per_block, problems)
    if problems:
        raise ArtifactError(f"The draft at {path} does not match: " + "; ".join(sorted(problems)) + ".")
    ours = {theirs: n for n, theirs in _NAMES.items()}
    draft.load_state_dict({ours.get(n, n): tensors[n].float() for n in expected}, strict=False)
    if temperatures is not None:
        draft.temperatures.copy_(temperatures)
    return draft.to(target.device).eval()


def _differs(theirs: torch.Tensor, mine: torch.Tensor) -> bool:
    """Whether a file's matrix is another than the target's, in the narrower precision of the two."""
    dtype = min(theirs.dtype, mine.dtype, key=lambda d: d.itemsize)
    return theirs.shape == mine.shape and not torch.equal(theirs.to(dtype), mine.to("cpu", dtype))


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
