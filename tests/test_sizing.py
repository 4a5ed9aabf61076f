"""A plan's figures are those of what is planned: parameters, bytes and memory of real drafts, shards and steps."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from jobs import plan as job
from pipeline.config import PipelineConfig
from pipeline.drafts.checkpoint import make_draft
from pipeline.drafts.config import resolve
from pipeline.entry import CONF, compose, run
from pipeline.errors import ConfigError, DraftlineError
from pipeline.features.store import FeatureRow, write_shard
from pipeline.sizing import GIB, plan, show, size_target
from pipeline.target import Target, load_target
from pipeline.training.step import TrainStep, Weights

OWN = ["corpus.source=/data/chats.jsonl", "corpus.regenerate.prompts=/data/prompts.jsonl"]
FULL_SIZE = sorted(f.stem for f in (CONF / "experiment").glob("*.yaml") if f.stem not in ("demo", "smoke"))
BILLIONS = {"qwen3_4b": 4.02, "qwen3_8b": 8.19, "qwen3_14b": 14.77, "gemma4_12b": 11.91, "deepseek_v4_flash": 284.3}


def smoke(tmp_path: Path, cache: Path, *overrides: str) -> PipelineConfig:
    places = [f"output_root={tmp_path}", f"cache_dir={cache}"]
    return compose(["experiment=smoke", "plan.rows=1000", "plan.tokens_per_row=120", *places, *overrides])


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def tiny(cache: Path) -> Target:
    return load_target(dataclasses.replace(PipelineConfig().target, path="tiny"), cache)


@pytest.mark.parametrize("name", FULL_SIZE)
def test_every_full_size_experiment_fits_its_cluster(name: str, tmp_path: Path) -> None:
    p = plan(compose([f"experiment={name}", f"output_root={tmp_path}", *OWN]))
    assert p.obstacles == []
    target, algorithm = name.rsplit("_", 1)
    assert p.target.parameters / 1e9 == pytest.approx(BILLIONS[target], rel=2e-3)
    assert p.draft.config.algorithm == algorithm
    assert "verdict   fits" in show(p)
    assert f"cluster   {p.config.cluster.gpus} GPUs ({p.config.cluster.accelerator}, " in show(p)
    assert ("does not decode" in " ".join(p.notes)) == name.startswith("deepseek"), (
        "only DeepSeek-V4 is not decoded here"
    )
    assert "the host's memory" in p.notes[0]
    assert not any("the whole target" in note for note in p.notes), "they start without its layers"


def notes(*overrides: str) -> str:
    return "\n".join(plan(compose([*overrides, *OWN])).notes)


def test_where_the_draft_will_load_is_said_before_it_is_trained() -> None:
    said = notes("experiment=qwen3_4b_dspark")
    assert "vLLM loads it as speculators." in said and "SGLang loads it as specforge." in said
    said = notes("experiment=gemma4_12b_dspark")
    assert "vLLM loads it as deepspec." in said and "SGLang loads it as deepspec." in said
    assert "It loads in vLLM when trained with draft.sample_from_anchor=false." in notes("experiment=qwen3_4b_dflash")


def test_a_draft_that_nothing_would_run_is_an_obstacle() -> None:
    """The engine does not decode DeepSeek-V4, and no other one runs a draft with sliding windows as it was trained."""
    windows = "draft.sliding_windows=[2048,2048,2048,2048,2048]"
    (obstacle,) = plan(compose(["experiment=deepseek_v4_flash_dspark", windows, *OWN])).obstacles
    assert obstacle.startswith("Nothing would run this draft") and "draft.sliding_windows=[]" in obstacle
    assert plan(compose(["experiment=qwen3_4b_dspark", windows, *OWN])).obstacles == [], "our own engine runs it"


def test_a_draft_taps_the_layers_that_its_features_come_from() -> None:
    """As training gives them to it."""
    few = "features.target_layer_ids=[1,17,33]"
    p = plan(compose(["experiment=qwen3_4b_dspark", "draft.target_layer_ids=[]", few, *OWN]))
    assert p.draft.config.target_layer_ids == [1, 17, 33]
    assert p.bytes_per_token == 4 * 2560 * 2 + 5
    with pytest.raises(ConfigError, match=r"features.target_layer_ids has \[1, 17, 33\]"):
        plan(compose(["experiment=qwen3_4b_dspark", few, *OWN]))


def test_what_workers_read_of_the_target_is_said(tmp_path: Path, cache: Path, tiny: Target) -> None:
    embedding, whole = (f"{n * 4 / 1024:,.1f} KiB" for n in (tiny.vocab_size * 64, tiny.model.num_parameters()))
    note, copied, *_ = plan(smoke(tmp_path, cache, "trainer.warm_start.layers=target")).notes
    assert f"{embedding} each, of " in note
    assert f"the whole target, {whole}, where it copies its last layers" in copied


def test_a_mixture_s_active_parameters_are_those_a_token_is_routed_to(tmp_path: Path) -> None:
    config = compose(["experiment=deepseek_v4_flash_dspark", *OWN])
    assert size_target(config.target, config.plan.target_config, tmp_path).active / 1e9 == pytest.approx(13, rel=0.1)


def test_matrices_of_the_draft_s_own_are_trained_and_paid_for(tmp_path: Path, cache: Path) -> None:
    borrowed = plan(smoke(tmp_path, cache))
    owned = plan(smoke(tmp_path, cache, "draft.own_embedding=true", "draft.own_lm_head=true"))
    more = (borrowed.target.vocabulary + borrowed.draft.d2t.shape[0]) * borrowed.target.hidden
    assert owned.parameters == borrowed.parameters + more
    assert owned.memory(2).optimizer - borrowed.memory(2).optimizer == 12 * more / owned.config.trainer.workers
    assert owned.step_flops > borrowed.step_flops


def test_parameters_and_bytes_are_those_of_the_draft_and_the_shard(tiny: Target, tmp_path: Path, cache: Path) -> None:
    p = plan(smoke(tmp_path, cache))
    full = resolve(p.config.draft, tiny.config, tiny.unused_token)
    draft = make_draft(full, tiny, torch.arange(full.draft_vocab_size))
    assert p.parameters == sum(q.numel() for q in draft.parameters())
    assert p.target.parameters == sum(q.numel() for q in tiny.model.parameters())

    length, width = int(p.tokens_per_row), len(full.target_layer_ids) * tiny.hidden_size
    rows = [
        FeatureRow(
            f"{i:032x}",
            torch.zeros(length, dtype=torch.int64),
            torch.ones(length, dtype=torch.bool),
            torch.zeros(length, width, dtype=torch.bfloat16),
            torch.zeros(length, tiny.hidden_size, dtype=torch.bfloat16),
        )
        for i in range(100)
    ]
    write_shard(tmp_path / "shard", rows, width, tiny.hidden_size)
    assert (tmp_path / "shard").stat().st_size == pytest.approx(p.store_bytes / 10, rel=0.01)


@pytest.mark.parametrize("draft", ["dspark_tiny", "dflash", "eagle3"])
def test_activations_are_estimated_within_a_factor_of_two(
    draft: str, tiny: Target, tmp_path: Path, cache: Path
) -> None:
    """Against what autograd keeps for the backward of a step, whose blocks are as many as the rows can hold."""
    overrides = [f"draft={draft}", "corpus.max_length=96", "trainer.num_anchors=64", "trainer.sequences_per_step=4"]
    if draft != "dspark_tiny":
        overrides += ["draft.num_layers=1", "draft.block_size=6", "draft.target_layer_ids=[0,2]"]
    p = plan(smoke(tmp_path, cache, *overrides))
    c = resolve(p.config.draft, tiny.config, tiny.unused_token)
    made = make_draft(c, tiny, torch.arange(c.draft_vocab_size or tiny.vocab_size))
    step = TrainStep(made, tiny.lm_head_weight, Weights(), num_anchors=64, seed=0)
    generator = torch.Generator().manual_seed(0)
    rows = [
        FeatureRow(
            f"{i:032x}",
            torch.randint(200, (96,), generator=generator),
            torch.ones(96, dtype=torch.bool),
            torch.randn(96, len(c.target_layer_ids) * tiny.hidden_size, generator=generator).bfloat16(),
            torch.randn(96, tiny.hidden_size, generator=generator).bfloat16(),
        )
        for i in range(2)  # of 4 rows, one of two workers' share
    ]
    kept: dict[int, int] = {}
    weights = {t.untyped_storage().data_ptr() for t in (*made.parameters(), *made.buffers())}

    def keep(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss, _ = step(rows, 0)
    assert loss.requires_grad
    ratio = p.memory(2).activations / sum(kept.values())
    assert 0.5 < ratio < 2, ratio


def test_sharding_divides_what_a_stage_says_it_divides(tmp_path: Path, cache: Path) -> None:
    p = plan(smoke(tmp_path, cache, "trainer.workers=2", "trainer.sequences_per_step=4"))
    one, two, three = (p.memory(s) for s in (1, 2, 3))
    assert one.gradients == one.weights == 4 * p.parameters and one.optimizer == 6 * p.parameters
    assert two.gradients == one.gradients / 2 and two.weights == one.weights
    assert three.weights == one.weights / 2 and three.optimizer == one.optimizer
    offloaded = plan(smoke(tmp_path, cache, "deepspeed=zero2_offload")).memory(2)
    assert offloaded.optimizer == 0 and offloaded.host == 6 * p.parameters


def test_what_does_not_fit_is_said_with_a_remedy_and_a_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["experiment=qwen3_14b_dspark", f"output_root={tmp_path}", *OWN]
    with pytest.raises(SystemExit) as ended:
        run(job.main, "plan", [*overrides, "features=store", "trainer.accumulate=1"], ray=False)
    said = capsys.readouterr().out
    assert ended.value.code == job.DOES_NOT_FIT
    assert "Stored features take" in said and "features=stream" in said
    assert "A training rank needs" in said and "trainer.accumulate" in said
    figures = json.loads((tmp_path / "qwen3_14b_dspark" / "plan.json").read_text())
    assert len(figures["obstacles"]) == 2 and figures["store_bytes"] > 4000 * GIB


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["trainer=gpu", "trainer.workers=2"],
            "2 GPUs are needed at once (train: 2 workers of 1 GPU); cluster.gpus=0",
        ),
        (["target.device=cuda"], "cluster.gpus=0. Name the cluster that it is for (cluster=h100x8"),
        (["cluster.num_cpus=1"], "2 logical CPUs are needed at once (train: 2 workers); cluster.num_cpus=1."),
        (
            ["features=stream", "cluster.num_cpus=2"],
            "3 logical CPUs are needed at once (train: 2 workers, 1 extr",
        ),
        (["corpus.regenerate.actors=5"], "5 logical CPUs are needed at once (regenerate: 5 answering actors)"),
        (
            ["target.device=cuda", "cluster.gpus=1"],
            "2 GPUs are needed at once (extract: 1 extracting actor of 1 GPU and 1 for the pipeline's own process, "
            "which decodes); cluster.gpus=1. Use fewer trainer.workers or features.actors, or submit the stages one by "
            "one: then 1 do.",
        ),
    ],
)
def test_processors_that_the_cluster_lacks_are_counted(
    overrides: list[str], says: str, tmp_path: Path, cache: Path
) -> None:
    (obstacle,) = plan(smoke(tmp_path, cache, *overrides)).obstacles
    assert says in obstacle


def test_what_is_enough_is_enough_and_what_was_not_checked_is_said(tmp_path: Path, cache: Path) -> None:
    p = plan(smoke(tmp_path, cache, "target.device=cuda", "cluster.gpus=2"))
    assert p.obstacles == []
    assert any("--entrypoint-num-gpus 1" in n for n in p.notes)
    assert any("cluster.gpu_memory_gib is not given" in n for n in p.notes)


def test_a_zero_stage_that_training_refuses_is_not_planned(tmp_path: Path, cache: Path) -> None:
    for stage in ("0", "4", "null"):
        with pytest.raises(ConfigError, match=r"deepspeed\.zero_optimization\.stage=.* must be 1, 2 or 3"):
            smoke(tmp_path, cache, f"deepspeed.zero_optimization.stage={stage}")
    with pytest.raises(ConfigError, match="must be 1, 2 or 3"):
        show(plan(dataclasses.replace(smoke(tmp_path, cache), deepspeed={})))


def test_a_plan_without_a_corpus_asks_what_to_expect(tmp_path: Path, cache: Path) -> None:
    config = smoke(tmp_path, cache)
    with pytest.raises(ConfigError, match=r"plan\.rows=1000000"):
        plan(dataclasses.replace(config, plan=dataclasses.replace(config.plan, rows=0)))
    broken = tmp_path / "config.json"
    broken.write_text('{"model_type": "bert"}')
    with pytest.raises(DraftlineError, match="bert"):
        size_target(config.target, str(broken), cache)
    broken.write_text('{"model_type": "of-tomorrow"}')
    with pytest.raises(DraftlineError, match=r"config\.json is not a model that transformers can load: .*of-tomorrow"):
        size_target(config.target, str(broken), cache)
