"""A plan for a terminal, and for a file."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline import artifact
from pipeline.sizing.cluster import GIB, bytes_text
from pipeline.sizing.plan import Plan


def show(p: Plan) -> str:
    """The plan as text, for a terminal."""
    c, t, config = p.draft.config, p.target, p.config
    trainer, assumed = config.trainer, config.plan
    active = f" ({t.active / 1e9:.1f} B active in the layers)" if t.active < 0.5 * t.parameters else ""
    corpus = "assumed: plan.rows, plan.tokens_per_row" if p.assumed else "the run's own corpus"
    item = config.features.compute_dtype or config.target.dtype
    on = f"of {config.features.gpus_per_actor} GPU" if config.target.device != "cpu" else "on CPU"
    lines = [
        f"plan: {config.name}",
        f"target    {config.target.path}: {t.config.num_hidden_layers} layers, hidden {t.hidden}, vocabulary "
        f"{t.vocabulary}; {t.parameters / 1e9:.2f} B parameters{active}",
        f"draft     {c.algorithm}, {c.num_layers} layer{'s' if c.num_layers > 1 else ''}, block {c.block_size}, taps "
        f"{c.target_layer_ids}, vocabulary {p.draft.d2t.shape[0]}; {p.parameters / 1e6:.1f} M trainable parameters",
        f"corpus    {p.rows:,} rows x {p.tokens_per_row:.0f} tokens = {p.tokens / 1e6:,.1f} M ({corpus})",
        f"features  {p.bytes_per_token:,} bytes a token; configured: {config.features.mode}",
        f"            store   {bytes_text(p.store_bytes)} on disk",
        f"            stream  nothing on disk, at most {bytes_text(p.stream_bytes)} in the object store",
        f"extract   an actor holds {bytes_text(p.extractor_bytes)} ({item}, {config.features.batch_tokens} tokens a "
        f"forward), {config.features.actors} actors {on}",
        f"train     {trainer.steps:,} steps of {trainer.sequences_per_step} rows = {p.epochs:.2f} epochs on "
        f"{trainer.workers} workers; GiB of a rank, activations estimated for rows of {config.corpus.max_length}:",
        "            ZeRO   weights gradients optimizer    frozen activations     total",
    ]
    for stage in (1, 2, 3):
        m = p.memory(stage)
        parts = (m.weights, m.gradients, m.optimizer, m.frozen, m.activations, m.total)
        mark = "  <- configured" if stage == p.stage else ""
        host = f", and {bytes_text(m.host)} of the host" if m.host else ""
        lines.append(
            f"            {stage:<4}" + "".join(f"{x / GIB:>10.2f}" for x in parts[:-2])
            + f"{parts[-2] / GIB:>12.2f}{parts[-1] / GIB:>10.2f}{mark}{host if mark else ''}"
        )  # fmt: skip
    stages = (
        ("extract", p.extract_flops, assumed.extract_utilisation),
        ("train", p.step_flops * trainer.steps, assumed.train_utilisation),
    )
    for name, flops, utilisation in stages:
        hours = p.hours(flops, utilisation)
        text = f"time      {name:<8}{flops / 1e15:,.3g} PFLOP"
        if hours is None:
            text += "; no rate to turn it into hours (plan.tflops)"
        else:
            text += f" = {hours:,.1f} GPU-hours at {assumed.tflops:g} TFLOP/s x {utilisation:.0%} (assumed)"
            text += f", {hours * assumed.price_per_gpu_hour:,.0f} in money" if assumed.price_per_gpu_hour else ""
        lines.append(text)
    lines += [f"note      {note}" for note in p.notes]
    size = config.cluster
    of_gpus = ", ".join(x for x in (size.accelerator, f"{size.gpu_memory_gib} GiB" * (size.gpu_memory_gib > 0)) if x)
    gpus = f"{size.gpus} GPUs" + (f" ({of_gpus})" if of_gpus else "")
    lines.append(f"cluster   {gpus}, {size.num_cpus} logical CPUs")
    lines += [f"OBSTACLE  {o}" for o in p.obstacles] or ["verdict   fits the cluster of the config"]
    return "\n".join(lines)


def save(p: Plan, out: Path) -> None:
    """Writes plan.json."""
    out.parent.mkdir(parents=True, exist_ok=True)
    artifact.write_json(out, json.loads(json.dumps(p.as_dict())))
