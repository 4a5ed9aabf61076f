"""Which drafts vLLM and SGLang load, in which format; and when they don't, why, and the nearest that loads.

Read from the engines' public sources of 2026, in single stored versions; no engine was run: vLLM's
models/qwen3_dspark.py, gemma4_dspark.py, qwen3_dflash.py, llama_eagle3.py and its speculators configs; SGLang's
models/dspark.py, gemma4_dspark.py, dflash.py, llama_eagle3.py and speculative/dspark_components. A draft that an engine
would load and then run wrongly (accepting hardly a token, without an error) counts as one that it does not load.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import ModuleType

from pipeline.drafts.base import Draft
from pipeline.drafts.formats import deepspec, eagle3, files, specforge, speculators
from pipeline.drafts.formats.files import Obstacle

FORMATS: dict[str, ModuleType] = {"speculators": speculators, "specforge": specforge, "deepspec": deepspec}
"""Each has `recognises(config.json)`, `obstacles(draft)`, `write(draft, target, out, ...)` and `read(path, target)`."""
OWN = {"vllm": "speculators", "sglang": "specforge"}
"""Engine -> the format that it loads most drafts from."""
TITLES = {"vllm": "vLLM", "sglang": "SGLang"}


@dataclasses.dataclass(frozen=True)
class Fit:
    """Whether an engine loads a draft from a format.

    Attributes:
        obstacles: why not; empty if it loads.
        elsewhere: (engine, format) pairs that load the draft as it is, nearest first.
        settings: what to train a draft with that this engine loads; empty where no settings are known to help.
    """

    engine: str
    format: str
    obstacles: tuple[Obstacle, ...] = ()
    elsewhere: tuple[tuple[str, str], ...] = ()
    settings: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def loads(self) -> bool:
        return not self.obstacles

    def __str__(self) -> str:
        if self.loads:
            return f"{TITLES[self.engine]} loads it as {self.format}."
        nearest = []
        if self.elsewhere:
            engine, name = self.elsewhere[0]
            nearest.append(f"as it is with export.engine={engine} export.format={name}")
        if self.settings:
            wanted = " ".join(f"{k}={v}" for k, v in self.settings.items())
            nearest.append(f"in {TITLES[self.engine]} when trained with {wanted}")
        told = " ".join(o.why for o in self.obstacles)
        remedy = f" It loads {'; or '.join(nearest)}." if nearest else " No combination of this version loads it."
        return f"{TITLES[self.engine]} does not load this draft as {self.format}. {told}{remedy}"


def fit(draft: Draft, engine: str, format: str = "") -> Fit:
    """Whether an engine loads a draft, and if it can't, why and the nearest combination that loads.

    Args:
        engine: vllm or sglang. format: speculators, specforge or deepspec; "" takes the engine's own.
    """
    format = format or OWN[engine]
    if not (found := _obstacles(draft, engine, format)):
        return Fit(engine, format)
    pairs = [(e, f) for e in (engine, *OWN) for f in (OWN[e], *FORMATS)]
    elsewhere = tuple(p for p in dict.fromkeys(pairs) if not _obstacles(draft, *p))
    settings: dict[str, str] = {}
    # Of the engine's own format: what another format lacks is no reason to train again.
    own = _obstacles(draft, engine, OWN[engine])
    for obstacle in own:
        settings |= obstacle.settings
    helps = all(o.settings for o in own)
    return Fit(engine, format, tuple(found), elsewhere, settings if helps else {})


def best(draft: Draft, engine: str) -> Fit:
    """How an engine loads a draft at all: its own format first; the own one's refusal where none loads."""
    fits = [fit(draft, engine, name) for name in dict.fromkeys((OWN[engine], *FORMATS))]
    return next((f for f in fits if f.loads), fits[0])


def _obstacles(draft: Draft, engine: str, format: str) -> list[Obstacle]:
    found = FORMATS[format].obstacles(draft)
    told = {tuple(o.settings) for o in found if o.settings}
    found += [o for o in _engine_obstacles(draft, engine) if tuple(o.settings) not in told]
    why = _unreadable(engine, format, draft.config.algorithm)
    return found + ([Obstacle(why)] if why else [])


def _engine_obstacles(draft: Draft, engine: str) -> list[Obstacle]:
    """What the engine's implementation can't run, whatever the format."""
    c, name, found = draft.config, TITLES[engine], []
    if c.algorithm == "eagle3":
        return _eagle3_obstacles(draft, engine)
    if engine == "vllm" and c.layer_family == "gemma4" and not c.values_are_keys:
        found.append(
            Obstacle(
                "vLLM's Gemma 4 drafts take their values from the keys' projection; this draft has one of its own.",
                {"draft.values_are_keys": "true"},
            )
        )
    if any(c.sliding_windows):
        found.append(
            Obstacle(
                # vLLM's newer DFlash takes a flag against it; whether its attention then sees both ways is not known.
                f"{name}'s sliding layers see only the earlier slots of a block (no version is known to do otherwise); "
                f"this draft's see all of them (sliding_windows={c.sliding_windows}).",
                {"draft.sliding_windows": "[]"},
            )
        )
    if c.algorithm == "dflash" and c.sample_from_anchor:
        found.append(
            Obstacle(
                f"{name} runs DFlash with an anchor's slot that predicts nothing; this draft has DeepSpec's layout, in "
                "which it predicts.",
                {"draft.sample_from_anchor": "false"},
            )
        )
    if c.algorithm == "dspark" and not c.has_markov:
        found.append(
            Obstacle(
                f"{name}'s DSpark always has a Markov head; this draft has none.",
                {"draft.markov_head_type": "vanilla", "draft.markov_rank": str(c.markov_rank or 256)},
            )
        )
    if engine == "vllm" and c.has_markov and c.markov_head_type != "vanilla":
        found.append(
            Obstacle(
                f"vLLM runs the vanilla Markov head only; this draft's is {c.markov_head_type}.",
                {"draft.markov_head_type": "vanilla"},
            )
        )
    if engine == "sglang":
        found += files.owned_obstacles(draft, "SGLang's block draft", files.EMBED, files.LM_HEAD)
    if engine == "sglang" and not files.full_vocabulary(draft):
        found.append(
            Obstacle(
                f"SGLang's drafts propose the target's whole vocabulary; this one {len(draft.d2t)} of "
                f"{draft.embed.shape[0]} tokens.",
                {"draft.draft_vocab_size": "0"},
            )
        )
    if engine == "sglang" and c.algorithm == "dspark" and not c.sample_from_anchor:
        found.append(
            Obstacle(
                "SGLang's DSpark slots all predict; in this draft the anchor's slot does not.",
                {"draft.sample_from_anchor": "true"},
            )
        )
    return found


def _eagle3_obstacles(draft: Draft, engine: str) -> list[Obstacle]:
    name = f"{TITLES[engine]}'s Eagle3"
    found = eagle3.taps_obstacle(draft, name, 3)
    if draft.config.qk_norm:
        found.append(
            Obstacle(f"{name} has Llama's layer, without QK norm; this draft has it.", {"draft.qk_norm": "false"})
        )
    if engine == "sglang":
        found += files.owned_obstacles(draft, name, files.EMBED) + eagle3.residual_obstacle(draft, name)
    return found


def _unreadable(engine: str, format: str, algorithm: str) -> str | None:
    """Why an engine has no reader of an algorithm's files in a format; None if it has one."""
    if format == "deepspec" and algorithm == "dflash":
        return f"{TITLES[engine]} takes DeepSpec's DFlash files for DSpark's, and misses the Markov head."
    if format == "deepspec" and algorithm == "eagle3":
        return f"{TITLES[engine]} has no model class for DeepSpec's Eagle3 files."
    if engine == "vllm" and format == "specforge" and algorithm == "eagle3":
        return "vLLM does not read the tapped layers from eagle_config, where SpecForge's files have them."
    if engine == "vllm" and format == "specforge" and algorithm == "dspark":
        return "vLLM takes the architecture DSparkDraftModel, which these files name, for DeepSeek-V4's."
    if engine == "sglang" and format == "speculators":
        if algorithm == "dspark":
            return "SGLang refuses files with speculators_model_type=dspark."
        if algorithm == "eagle3":
            return "SGLang has no model class for speculators' Eagle3 files."
        return "SGLang reads DFlash's layers and mask token from dflash_config, which speculators' files do not have."
    return None
