"""Every YAML composes to checked values, and a wrong name is answered with the nearest right one."""

from __future__ import annotations

import pytest

from pipeline.config import PipelineConfig, to_plain
from pipeline.entry import CONF, compose, run
from pipeline.errors import ConfigError

# What a group's option needs beside itself: `own` has no data of its own; ???.
NEEDS = {"own": ["corpus.source=/data/chats.jsonl", "corpus.regenerate.prompts=/data/prompts.jsonl"]}
OPTIONS = sorted((file.parent.name, file.stem) for file in CONF.glob("*/*.yaml") if file.parent.name != "experiment")
EXPERIMENTS = sorted(file.stem for file in (CONF / "experiment").glob("*.yaml"))


def needs_own(name: str) -> list[str]:
    return [] if name in ("demo", "smoke") else NEEDS["own"]


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_of_every_group_composes(group: str, option: str) -> None:
    assert isinstance(compose([f"{group}={option}", *(NEEDS["own"] if option == "own" else [])]), PipelineConfig)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_is_called_by_its_file(name: str) -> None:
    assert compose([f"experiment={name}", *needs_own(name)]).name == name


def test_extraction_taps_the_layers_that_the_draft_reads() -> None:
    for name in EXPERIMENTS:
        config = compose([f"experiment={name}", *needs_own(name)])
        assert config.draft.target_layer_ids, name
        assert config.features.target_layer_ids == config.draft.target_layer_ids, name


@pytest.mark.parametrize("name", [n for n in EXPERIMENTS if n not in ("demo", "smoke")])
def test_full_size_experiments_name_the_cluster_that_they_need(name: str) -> None:
    cluster = compose([f"experiment={name}", *needs_own(name)]).cluster
    assert cluster.gpus > 0 and cluster.accelerator and cluster.gpu_memory_gib > 0 and cluster.storage_gib > 0


def test_an_override_reaches_the_typed_value() -> None:
    config = compose(["experiment=smoke", "trainer.steps=4", "draft.target_layer_ids=[1,2]"])
    assert config.trainer.steps == 4
    assert config.features.target_layer_ids == [1, 2]


@pytest.mark.parametrize("prefix", ["/", "/v2", "/a/b-c.d"])
def test_routes_that_serve_takes_are_taken(prefix: str) -> None:
    assert compose([f"serving.route_prefix={prefix}"]).serving.route_prefix == prefix


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:0", "auto"])
def test_devices_that_every_actor_has_are_taken(device: str) -> None:
    assert compose([f"target.device={device}"]).target.device == device


def test_deepspeed_settings_pass_through_as_they_are() -> None:
    assert compose(["deepspeed=zero3"]).deepspeed == {"zero_optimization": {"stage": 3}}


def test_what_bounds_memory_or_says_where_to_run_makes_no_other_features_or_draft() -> None:
    from pipeline.features.extract import stage_config as of_features
    from pipeline.training.trainer import stage_config as of_training

    base = compose(["features=stream"])
    memory = ["features.batch_tokens=77", "features.gpus_per_actor=2", "features.shard_rows=9", "trainer.chunk_rows=5"]
    less = compose(["features=stream", *memory, "trainer.workers=4"])
    assert of_training(less) == of_training(base)
    other = compose(["features.batch_tokens=77", "features.actors=5"])
    assert of_features(other.features, other.target, "train") == of_features(compose([]).features, base.target, "train")
    assert of_training(compose(["features=stream", "trainer.lr=0.5"])) != of_training(base)


def test_values_survive_being_plain() -> None:
    from pipeline.config import from_plain

    config = compose(["experiment=demo"])
    assert from_plain(PipelineConfig, to_plain(config)) == config


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("experiment=demoo", "Did you mean 'demo'?"),
        ("draft=dsparc", "Did you mean 'dspark'?"),
        ("experimnt=demo", "Did you mean 'experiment'?"),
        ("trainer.stepz=3", "Did you mean 'steps'?"),
        ("corpus.regenerate.limitt=3", "Did you mean 'limit'?"),
        ("engine.schedular=global", "Did you mean 'scheduler'?"),
        ("engine.scheduler=globl", "Did you mean 'global'?"),
        ("engine.scheduler=asynchron", "Did you mean 'asynchronous'?"),
        ("engine.treshold=0.3", "Did you mean 'threshold'?"),
        ("engine.step_cost=costs.json", "Use an absolute path: '/"),
        ("engine.threshold=0", "engine.threshold=0.0 must be above 0"),
        ("trainer.steps=many", "trainer.steps='many' must be of type int"),
        ("trainer.position_weights=survivals", "Did you mean 'survival'?"),
        ("trainer.survival_floor=0", "trainer.survival_floor=0.0 must be above 0"),
        ("trainer.lk=-1", "trainer.lk=-1.0 must be at least 0"),
        ("trainer.steps=0", "trainer.steps=0 must be above 0"),
        ("benchmark.calibrate_prompts=0", "benchmark.calibrate_prompts=0 must be above 0"),
        ("trainer.warmup_steps=-1", "trainer.warmup_steps=-1 must be 0 or more"),
        ("trainer.lr=nan", "trainer.lr=nan must be a finite number"),
        ("trainer.grad_clip=inf", "trainer.grad_clip=inf must be a finite number"),
        ("gate.max_regression=5", "gate.max_regression=5.0 must be from 0 to 1"),
        ("benchmark.seed=-1", "benchmark.seed=-1 must be 0 or more"),
        ("parity.seed=-1", "parity.seed=-1 must be 0 or more"),
        ("parity.max_new_tokens=2", "parity.max_new_tokens=2 must be 3 or more"),
        ("name=", "name='' is the folder of the run"),
        ("name=../other", "name='../other' is the folder of the run"),
        ("name=..", "name='..' is the folder of the run"),
        ("serving.route_prefix=v2", "serving.route_prefix='v2' must be / or begin with one"),
        ("serving.route_prefix=/v2/", "serving.route_prefix='/v2/' must be / or begin with one and not end with one"),
        ("serving.route_prefix=", "serving.route_prefix='' must be / or begin with one"),
        ("serving.route_prefix=//", "serving.route_prefix='//' must be /"),
        ("serving.route_prefix='/{a}'", "must be / or begin with one"),
        ("serving.app_name=", "serving.app_name is empty"),
        (
            "tracking.model_name=qwen3-1.7b",
            "model_name='qwen3-1.7b' must not be blank or have one of / : . % \" '",
        ),
        ("tracking.model_name='a/b'", "tracking.model_name='a/b' must not be blank"),
        ("tracking.model_name=' '", "tracking.model_name=' ' must not be blank"),
        ("trainer.warm_start.layers=feature", "Did you mean 'features'?"),
        ("target.device=cuda:1", "Ray chooses the GPU of each actor, which sees no other"),
        ("target.device=gpu", "target.device='gpu' is not one of cpu, cuda, auto."),
        ("target.device=cuda:x", "target.device='cuda:x' is not one of cpu, cuda, auto."),
        ("trainer.use_gpu=1", "trainer.use_gpu=1 must be of type bool"),
        ("nonsense", "is not a setting; write name=value"),
    ],
)
def test_a_wrong_name_or_value_is_one_line_that_helps(override: str, says: str) -> None:
    with pytest.raises(ConfigError) as error:
        compose([override])
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["features=stream", "draft.qk_norm=false"], "features.mode=stream"),
        (["draft.qk_norm=true"], "draft.qk_norm=true"),
    ],
)
def test_settings_that_exclude_each_other_are_refused_together(overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        compose(["trainer.warm_start.layers=features", *overrides])


def test_weights_that_train_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="nothing would train the draft's tokens"):
        compose(["trainer.ce=0", "trainer.kl=0", "trainer.tv=0"])


def test_a_missing_value_is_named() -> None:
    with pytest.raises(ConfigError, match="corpus.source"):
        compose(["corpus=own"])


def test_a_job_answers_a_mistake_with_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    status = run(lambda config: pytest.fail("the job ran"), "corpus", ["experiment=demoo"], ray=False)
    shown = capsys.readouterr().err
    assert status == 2
    assert shown.startswith("corpus: experiment=demoo") and shown.count("\n") == 1
