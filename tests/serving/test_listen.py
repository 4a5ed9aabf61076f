"""What Serve is asked for, and what a cluster answers whose HTTP proxy does not come up."""

from __future__ import annotations

from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from pipeline.config import EngineConfig, ServingConfig, TargetConfig
from pipeline.errors import DraftlineError
from pipeline.serving import app


@pytest.mark.parametrize(("device", "gpus"), [("cpu", None), ("cuda", 1), ("auto", 1)])
def test_the_replica_asks_for_a_gpu_as_other_actors_do(
    monkeypatch: pytest.MonkeyPatch, device: str, gpus: int | None
) -> None:
    asked = {}
    deployment = app.serve.deployment

    def seen(**options: Any) -> Any:
        asked[options["name"]] = options["ray_actor_options"]
        return deployment(**options)

    monkeypatch.setattr(app.serve, "deployment", seen)
    monkeypatch.setattr(app.ray, "cluster_resources", lambda: {"GPU": 1.0})
    app.application(TargetConfig(path="tiny", device=device), EngineConfig(), cache_dir=".")
    assert asked[app.TARGET].get("num_gpus") == gpus
    assert "num_gpus" not in asked[app.INGRESS]


def test_without_a_gpu_in_the_cluster_nothing_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app.ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(app, "_listen", lambda _: pytest.fail("Serve was started"))
    with pytest.raises(DraftlineError, match="target.device='auto'.*has 0 GPUs"):
        app.deploy(ServingConfig(port=0), TargetConfig(path="tiny", device="auto"), EngineConfig(), cache_dir=".")


def test_a_proxy_that_does_not_come_up_is_one_error_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    stopped = []

    def start(**_: object) -> None:
        raise ActorDiedError()

    monkeypatch.setattr(app, "_running_http", lambda: None)
    monkeypatch.setattr(app.serve, "start", start)
    monkeypatch.setattr(app.serve, "shutdown", lambda: stopped.append(True))
    with pytest.raises(DraftlineError, match="RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S=60"):
        app._listen(ServingConfig(port=0))
    assert stopped, "what did start of Serve is stopped again"
