"""The Serve application on a real target: what it says is what the engine says, through the official client."""

from __future__ import annotations

import concurrent.futures
import json
import os
import socket
import urllib.error
import urllib.request

import openai
import pytest
import ray

from infra.local.cluster import PATIENT
from pipeline.config import EngineConfig, ServingConfig, TargetConfig
from pipeline.corpus.conversations import Message
from pipeline.corpus.rows import ChatFormat
from pipeline.decoding import Request
from pipeline.errors import ArtifactError, DraftlineError
from pipeline.serving.app import deploy, undeploy
from pipeline.serving.replica import build_engine

pytestmark = pytest.mark.ray

TARGET = TargetConfig(path="tiny")
ENGINE = EngineConfig(max_requests=4, max_context=256, threads=1)
PROMPTS = ["What is a draft?", "Count to five.", "Say hello in French.", "Why is the sky blue?"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def cluster():
    os.environ.update(PATIENT)  # other tests share the cores
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
    for name in PATIENT:
        del os.environ[name]


@pytest.fixture(scope="module")
def served(cluster, cache):
    """URL of the tiny target, served without a draft."""
    config = ServingConfig(port=0)
    yield deploy(config, TARGET, ENGINE, cache_dir=cache, model_name="draftline-tiny", draft_version="0")
    undeploy(config.app_name)


@pytest.fixture(scope="module")
def expected(cache) -> dict[str, str]:
    """What the engine itself says to each prompt, greedily."""
    engine = build_engine(TARGET, ENGINE, cache, None)
    chat = ChatFormat(engine.target.tokenizer)
    requests = [Request(chat.prompt_ids([Message("user", p)]), max_new_tokens=24) for p in PROMPTS]
    return {p: chat.decode(c.token_ids) for p, c in zip(PROMPTS, engine.generate(requests), strict=True)}


@pytest.fixture
def api(served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served}/v1", api_key="none", max_retries=0, timeout=60)


def ask(api: openai.OpenAI, prompt: str, **fields):
    messages = [{"role": "user", "content": prompt}]
    return api.chat.completions.create(
        **{"model": "draftline-tiny", "messages": messages, "max_tokens": 24, "temperature": 0, **fields}
    )


def streamed(chunks) -> str:
    return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)


def test_the_target_is_listed(api, served):
    names = [m.id for m in api.models.list()]
    assert "draftline-tiny" in names
    assert len(names) == 2
    assert json.load(urllib.request.urlopen(f"{served}/healthz", timeout=10))["status"] == "ok"


def test_served_text_is_the_engines_streamed_or_not(api, expected):
    for prompt, text in expected.items():
        answer = ask(api, prompt)
        assert answer.choices[0].message.content == text
        assert streamed(ask(api, prompt, stream=True)) == text
        assert answer.draftline["tau"] == 1.0
        assert answer.usage.completion_tokens <= 24
    assert len(set(expected.values())) > 1


def test_requests_at_once_each_get_their_own_text(api, expected):
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda p: streamed(ask(api, p, stream=True)), PROMPTS))
    assert answers == [expected[p] for p in PROMPTS]


def test_a_seed_repeats_a_sampled_answer(api):
    def say(seed):
        return ask(api, PROMPTS[0], temperature=1.0, top_p=0.95, seed=seed).choices[0].message.content

    assert say(1) == say(1)
    assert len({say(seed) for seed in range(4)}) > 1


def test_completions_and_usage(api):
    answer = api.completions.create(model="draftline-tiny", prompt="The sky", max_tokens=5, temperature=0)
    stream = api.completions.create(
        model="draftline-tiny",
        prompt="The sky",
        max_tokens=5,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == answer.choices[0].text
    assert chunks[-1].usage == answer.usage


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [({"n": 17}, 400, "n"), ({"model": "gpt"}, 404, "model"), ({"max_tokens": 10_000}, 400, "max_tokens")],
)
def test_refusals_cross_the_cluster_with_their_status(api, fields, status, param):
    with pytest.raises(openai.APIStatusError) as e:
        ask(api, "x", **fields)
    assert (e.value.status_code, e.value.param) == (status, param)


def test_another_port_than_the_running_one_is_refused(served, cache):
    with pytest.raises(DraftlineError, match="already listens"):
        deploy(ServingConfig(port=1), TARGET, ENGINE, cache_dir=cache)


def test_a_missing_draft_is_named_before_anything_starts(served, cache, tmp_path):
    with pytest.raises(ArtifactError, match="No draft artifact"):
        deploy(ServingConfig(port=0), TARGET, ENGINE, cache_dir=cache, draft_dir=tmp_path / "none")


def test_a_port_in_use_is_refused(cluster, cache):
    from pipeline.serving.app import _free_port

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(DraftlineError, match=r"can't be used.*serving.port"):
            _free_port("127.0.0.1", taken.getsockname()[1])
