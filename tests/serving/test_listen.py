"""What a cluster answers whose HTTP proxy does not come up."""

from __future__ import annotations

import pytest
from ray.exceptions import ActorDiedError

from pipeline.config import ServingConfig
from pipeline.errors import DraftlineError
from pipeline.serving import app


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
