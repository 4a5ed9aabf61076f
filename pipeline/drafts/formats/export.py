"""A draft as a directory that vLLM or SGLang takes as it is: weights, config.json, temperatures.json and a README.md
with the launch command and where the draft is from."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import artifact
from pipeline.drafts.base import Draft
from pipeline.drafts.checkpoint import load_draft
from pipeline.drafts.formats import files
from pipeline.drafts.formats.engines import FORMATS, OWN, TITLES, Fit, fit
from pipeline.errors import ConfigError
from pipeline.target import Target, load_identity, load_target, obtain

if TYPE_CHECKING:
    from pipeline.config import ExportConfig, TargetConfig


def export_draft(
    draft_dir: Path,
    target: TargetConfig,
    config: ExportConfig,
    out: Path,
    cache_dir: Path,
    *,
    source: str,
    begin: Callable[[], object] = lambda: None,
) -> artifact.Manifest:
    """Exports a draft artifact; returns the manifest (kind "export") of what is at `out`, made now or before.

    Args:
        source: where the draft is from, in words, for the README.
        begin: called when there is work.
    Raises:
        ConfigError: the engine does not load this draft; says why, and the nearest combination that loads.
        ArtifactError: the draft is damaged or belongs to another target.
    """
    format = config.format or OWN[config.engine]
    served = config.served_target or _served(target, cache_dir)
    settings = {"engine": config.engine, "served_target": served, "source": source}
    inputs = {"draft": artifact.load(draft_dir, "draft", verify=False).digest}
    identity = load_identity(target, cache_dir).as_dict()
    wanted = {"format": format, **settings}
    if (done := artifact.current(out, "export", config=wanted, inputs=inputs, target=identity)) is not None:
        return done
    begin()
    loaded = load_target(target, cache_dir)
    draft = load_draft(draft_dir, loaded)
    result = fit(draft, config.engine, format)
    if not result.loads:
        raise ConfigError(str(result))
    text = readme(draft, loaded, result, served, source=source, digest=inputs["draft"])
    more: dict[str, Any] = {"served_target": served} if format == "speculators" else {}
    print(f"export: {source}; {result}", flush=True)
    return FORMATS[format].write(
        draft, loaded, out, inputs=inputs, settings=settings, texts={"README.md": text}, **more
    )


def _served(target: TargetConfig, cache_dir: Path) -> str:
    """What an engine on this machine loads the target by: a hub id, or a directory."""
    if "/" in target.path and not Path(target.path).is_dir():
        return target.path
    return str(obtain(target, cache_dir).absolute())


def launch(draft: Draft, engine: str, served_target: str) -> str:
    """The shell command, run in the exported directory, that serves the target with the draft."""
    c, tokens, served = draft.config, draft.config.tokens_per_block, shlex.quote(served_target)
    if engine == "vllm":
        config = json.dumps({"method": c.algorithm, "model": "$PWD", "num_speculative_tokens": tokens})
        quoted = config.replace('"', '\\"')  # within double quotes, so that the shell fills in $PWD
        return f'vllm serve {served} --speculative-config "{quoted}"'
    if c.algorithm == "eagle3":
        return " \\\n    ".join(
            [
                f"python -m sglang.launch_server --model-path {served}",
                '--speculative-algorithm EAGLE3 --speculative-draft-model-path "$PWD"',
                f"--speculative-num-steps {tokens} --speculative-eagle-topk 1",
                f"--speculative-num-draft-tokens {tokens + 1}",
            ]
        )
    lines = [
        f"python -m sglang.launch_server --model-path {served}",
        f'--speculative-algorithm {c.algorithm.upper()} --speculative-draft-model-path "$PWD"',
        f"--speculative-num-draft-tokens {tokens + 1}",
    ]
    if c.algorithm == "dspark" and c.enable_confidence_head:
        lines.append(f'--speculative-dspark-confidence-sts-path "$PWD/{files.TEMPERATURES}"')
    elif c.algorithm == "dspark":
        # In its other modes SGLang insists on the weights of a confidence head.
        lines[0] = f"SGLANG_RAGGED_VERIFY_MODE=static {lines[0]}"
    return " \\\n    ".join(lines)


def readme(draft: Draft, target: Target, fit: Fit, served_target: str, *, source: str, digest: str) -> str:
    """README.md of an exported directory: how to serve it, what it is, where it is from."""
    c, who = draft.config, target.identity
    heads = [f"{c.markov_head_type} Markov head of rank {c.markov_rank}"] if c.has_markov else []
    heads += ["confidence head"] if c.enable_confidence_head else []
    slots = "predicts too" if c.sample_from_anchor else "predicts nothing"
    eagle3 = c.algorithm == "eagle3"
    unit = "one after the other" if eagle3 else f"{c.block_size} slots; the anchor's {slots}"
    rows = {
        "algorithm": c.algorithm,
        "format": f"{fit.format}, for {TITLES[fit.engine]}",
        "tokens per block": f"{c.tokens_per_block} ({unit})",
        "layers": str(c.num_layers),
        "tapped target layers": f"{c.target_layer_ids}, outputs of layers counted from 0",
        "heads": ", ".join(heads) or "none",
        "vocabulary": f"{len(draft.d2t)} of {target.vocab_size} tokens",
        "mask token": "" if eagle3 else str(c.mask_token_id),
        "weights": "bfloat16",
        "draft": source or "unregistered",
        "draft digest": digest,
        "target": who.id,
        "target revision": who.revision,
        "target weights": who.weight_digest,
        "target tokenizer": who.tokenizer_digest,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items() if value)
    title = f"# {c.algorithm} draft for {who.id}"
    command = f"In this directory:\n\n```bash\n{launch(draft, fit.engine, served_target)}\n```"
    notes = "\n\n".join(_notes(draft, fit))
    return f"{title}\n\n{command}\n\n{notes}\n\n| | |\n| --- | --- |\n{table}\n"


def _notes(draft: Draft, fit: Fit) -> list[str]:
    c = draft.config
    notes = ["The target must be the one below, weights and tokenizer: acceptance falls with any other."]
    if fit.engine == "vllm" and fit.format == "speculators" and c.algorithm == "dspark" and c.sample_from_anchor:
        notes.append(
            "vLLM must read `sample_from_anchor` from this config (its pull request 48639, July 2026). An older one "
            "takes every DSpark draft for one whose anchor slot predicts nothing, and accepts hardly a token."
        )
    if fit.engine == "sglang" and fit.format == "specforge" and c.algorithm == "dspark":
        notes.append(
            "SGLang must have the architecture DSparkDraftModel (models/dspark.py). Its first versions with DSpark "
            "know Qwen3DSparkModel alone: for them, export with export.format=deepspec."
        )
    if c.algorithm == "eagle3" and fit.engine == "sglang":
        notes.append(
            "SGLang lends the target's embedding; the rows of lm_head are in the file. Chains only: with "
            "--speculative-eagle-topk above 1 it drafts trees, which nothing here was measured with."
        )
    if c.algorithm == "dspark" and c.enable_confidence_head and fit.engine == "vllm":
        notes.append(
            f"vLLM reads no calibration. `{files.TEMPERATURES}` holds one temperature per position for engines that "
            "do: the confidence logit of position k is divided by the k-th."
        )
    elif c.algorithm == "dspark" and c.enable_confidence_head:
        notes.append(
            f"`{files.TEMPERATURES}` is SGLang's STS calibration: the confidence logit of position k is divided by the "
            "k-th temperature. SGLang schedules by confidence with SGLANG_RAGGED_VERIFY_MODE=compact or cap-accept; "
            "with static it leaves the confidence head unused."
        )
    return notes
