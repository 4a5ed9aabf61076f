"""The Ray Serve application: an HTTP ingress and one target replica with its draft in the same process.

    url = deploy(config.serving, config.target, config.engine, cache_dir=..., draft_dir=champion.draft_dir)
    ... openai.OpenAI(base_url=f"{url}/v1", api_key="none") ...
    undeploy(config.serving.app_name)

The draft is colocated because a hop between deployments costs milliseconds, a step of a small target tens of them.
Text crosses the hop to the ingress once per engine step, never once per token.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import socket
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, cast

import ray
from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from ray.serve.schema import LoggingConfig

from pipeline.actors import num_gpus
from pipeline.artifact import load
from pipeline.config import EngineConfig, ServingConfig, TargetConfig
from pipeline.errors import DraftlineError
from pipeline.serving.http import build
from pipeline.serving.protocol import ApiError
from pipeline.serving.replica import TargetReplica, build_engine

TARGET = "target"
INGRESS = "ingress"


class ServedTarget(TargetReplica):
    """The target replica as a deployment: loads in the constructor, so that it is ready when Serve says so."""

    def __init__(
        self,
        target: dict[str, Any],
        engine: dict[str, Any],
        cache_dir: str,
        draft_dir: str | None,
        model_name: str | None,
        draft_version: str | None,
    ) -> None:
        built = build_engine(TargetConfig(**target), EngineConfig(**engine), cache_dir, draft_dir)
        super().__init__(built, model_name, draft_version, target.get("system_prompt"))


class HandleBackend:
    """The replica across a Serve handle; what the handle raises becomes an answer with a status."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def describe(self) -> dict[str, Any]:
        try:
            return await self._handle.describe.remote()
        except _UNAVAILABLE as e:
            raise _unavailable(e) from None

    async def health(self) -> dict[str, Any]:
        try:
            return await self._handle.health.remote()
        except _UNAVAILABLE:
            return {"status": "dead"}

    async def generate(self, job: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        response = cast(DeploymentResponseGenerator[Any], self._handle.options(stream=True).generate.remote(job))
        ended = False
        try:
            async for item in response:
                yield item
            ended = True
        except RayTaskError as e:  # raised in the replica: asking again would raise it again
            ended = True
            yield ApiError(500, f"The target's replica failed: {type(e.cause).__name__}.", code="internal").item()
        except _UNAVAILABLE as e:
            ended = True
            yield _unavailable(e).item()
        finally:
            if not ended:
                response.cancel()


_UNAVAILABLE = (BackPressureError, DeploymentUnavailableError, RayServeException, RayError)


def _unavailable(e: Exception) -> ApiError:
    if isinstance(e, BackPressureError):
        return ApiError(429, "The server's queue is full. Try again later.", code="queue_full")
    return ApiError(503, f"The target's replica is not available ({type(e).__name__}). Try again later.")


@serve.ingress()
class Ingress:
    """The HTTP side of the application."""

    def __init__(self, target: DeploymentHandle) -> None:
        self._target = target

    def __serve_build_asgi_app__(self) -> Any:
        return build(HandleBackend(self._target))


def application(
    target: TargetConfig,
    engine: EngineConfig,
    *,
    cache_dir: Path | str,
    draft_dir: Path | str | None = None,
    model_name: str | None = None,
    draft_version: str | None = None,
) -> serve.Application:
    """The bound application, for `serve.run` or a Serve config file.

    Raises:
        DraftlineError: the cluster that Ray is connected to has no GPU for a target that decodes on one.
    """
    # Every request that the engine would queue must reach it: its own bound answers 429, Serve's never comes first.
    ongoing = engine.max_requests + engine.max_queue + 16
    gpus = num_gpus(target)
    replica = serve.deployment(
        name=TARGET,
        num_replicas=1,
        max_ongoing_requests=ongoing,
        health_check_period_s=5,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=30,
        max_constructor_retry_count=1,
        ray_actor_options={"num_cpus": 1} if gpus is None else {"num_cpus": 1, "num_gpus": gpus},
    )(ServedTarget).bind(
        dataclasses.asdict(target),
        dataclasses.asdict(engine),
        str(Path(cache_dir).absolute()),
        str(Path(draft_dir).absolute()) if draft_dir else None,
        model_name,
        draft_version,
    )
    ingress = serve.deployment(
        name=INGRESS, num_replicas=1, max_ongoing_requests=2 * ongoing, ray_actor_options={"num_cpus": 0}
    )(Ingress)
    return ingress.bind(replica)


def deploy(
    serving: ServingConfig,
    target: TargetConfig,
    engine: EngineConfig,
    *,
    cache_dir: Path | str,
    draft_dir: Path | str | None = None,
    model_name: str | None = None,
    draft_version: str | None = None,
) -> str:
    """Deploys onto the Ray cluster that this process is connected to and waits until it answers.

    Args:
        serving: host, port (0: a free one), app_name, route_prefix.
        draft_dir: a draft artifact on a path that the cluster's nodes see; None decodes plainly.
    Returns:
        the base URL, e.g. `http://127.0.0.1:8000`; clients add `/v1`.
    Raises:
        DraftlineError: the cluster has no GPU for the target, the port is taken, Serve already listens on another, its
            proxy did not come up, or the replica could not load.
        ArtifactError: the draft is missing or damaged.
    """
    if draft_dir is not None:
        load(draft_dir, "draft")
    app = application(
        target,
        engine,
        cache_dir=cache_dir,
        draft_dir=draft_dir,
        model_name=model_name,
        draft_version=draft_version,
    )
    host, port = _listen(serving)
    logs = LoggingConfig(log_level="WARNING", enable_access_log=False)
    try:
        serve.run(app, name=serving.app_name, route_prefix=serving.route_prefix, logging_config=logs)
    except RuntimeError as e:
        cause = _why(serving.app_name) or str(e)
        _remove(serving.app_name)
        raise DraftlineError(f"The application {serving.app_name!r} did not start: {cause}") from None
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    return f"http://{shown}:{port}{serving.route_prefix.rstrip('/')}"


def undeploy(app_name: str, timeout: float = 30.0) -> None:
    """Drains and removes the application; stops Serve, which frees its port, when no other application is left.

    While it drains, new requests get 503 and those in flight end normally, for `timeout` seconds at most.
    """
    if app_name not in serve.status().applications:
        return
    with contextlib.suppress(RayError, RayServeException, TimeoutError):  # a dead replica has nothing to drain
        serve.get_deployment_handle(TARGET, app_name).drain.remote(timeout).result(timeout_s=timeout + 5)
    _remove(app_name)


def _remove(app_name: str) -> None:
    serve.delete(app_name)
    if not serve.status().applications:
        serve.shutdown()


def _listen(serving: ServingConfig) -> tuple[str, int]:
    """Starts Serve's proxy, or finds the one that runs; returns its host and port."""
    running = _running_http()
    if running is not None:
        if serving.port not in (0, running[1]):
            raise DraftlineError(
                f"serving.port={serving.port}, but Ray Serve already listens on port {running[1]} of this cluster. "
                f"Use serving.port={running[1]} (or 0), or undeploy what runs there first."
            )
        return running
    port = _free_port(serving.host, serving.port)
    try:
        serve.start(
            proxy_location=ProxyLocation.HeadOnly,
            http_options=HTTPOptions(host=serving.host, port=port),
            logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
        )
    except RayActorError as e:
        serve.shutdown()
        raise DraftlineError(
            "Ray Serve's HTTP proxy did not come up: Serve gives up on one that is not ready in time. On a busy node "
            "start the cluster with RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S=60 in its environment and try again "
            f"({' '.join(str(e).split())[:200]})."
        ) from None
    return serving.host, port


def _running_http() -> tuple[str, int] | None:
    from ray.serve.context import _get_global_client

    with contextlib.suppress(RayServeException):
        client = _get_global_client(raise_if_no_controller_running=False)
        if client is not None:
            options = ray.get(client._controller.get_http_config.remote())
            return str(options.host), int(options.port)
    return None


def _free_port(host: str, port: int) -> int:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((host, port))
        except (OSError, OverflowError) as e:
            why = getattr(e, "strerror", None) or e
            raise DraftlineError(
                f"serving.port={port} on {host} can't be used ({why}). Choose another serving.port, "
                "or 0 for a free one."
            ) from None
        return int(s.getsockname()[1])


def _why(app_name: str) -> str:
    """The last line of what Serve says of a failed application: the error that its replica raised."""
    status = serve.status().applications.get(app_name)
    if status is None:
        return ""
    texts = [status.message, *(d.message for d in status.deployments.values())]
    lines = [line.strip() for t in texts for line in t.splitlines()]
    errors = [m.group(1) for line in lines if (m := re.match(r"[\w.]+(?:Error|Exception|Full): (.+)", line))]
    return errors[-1] if errors else next((t for t in reversed(texts) if t), "")
