"""The recorder: runs that say truthfully what happened, whole configs, inputs with digests."""

from __future__ import annotations

import contextlib
import json
import socket
import threading

import pytest

from pipeline.errors import DraftlineError
from pipeline.registry.recorder import Recorder, _answers, flatten, identity_tags


def run_of(recorder, run_id):
    return recorder.client.get_run(run_id)


@pytest.fixture
def answering():
    """Starts a server that answers one connection with these bytes; gives its address."""
    threads: list[threading.Thread] = []
    with contextlib.ExitStack() as stack:

        def start(answer: bytes) -> str:
            listening = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

            def once() -> None:
                connection, _ = listening.accept()
                with connection:
                    connection.recv(4096)
                    connection.sendall(answer)

            threads.append(threading.Thread(target=once, daemon=True))
            threads[-1].start()
            return f"http://127.0.0.1:{listening.getsockname()[1]}"

        yield start
        for thread in threads:
            thread.join(10)


@pytest.mark.parametrize(
    ("uri", "why"),
    [
        ("http://127.0.0.1:port", "InvalidURL: nonnumeric port: 'port'"),
        ("http://127.0.0.1:1", "Connection refused"),
        ("http://[::1", "ValueError: Invalid IPv6 URL"),
        ("http://a..b:80", "empty or too long"),
    ],
)
def test_an_address_at_which_no_server_can_be_is_one_error(uri, why, tmp_path):
    with pytest.raises(DraftlineError, match=r"tracking\.uri=.*leave tracking\.uri empty") as e:
        Recorder(uri, "draftline", tmp_path)
    assert repr(uri) in str(e.value) and why in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("answer", [b"SSH-2.0-OpenSSH_9.6\r\n", b""], ids=["another protocol", "nothing"])
def test_a_server_that_is_no_http_server_is_one_error(answering, tmp_path, answer):
    uri = answering(answer)
    with pytest.raises(DraftlineError, match="No MLflow server answers") as e:
        Recorder(uri, "draftline", tmp_path)
    assert uri in str(e.value) and "\n" not in str(e.value)


def test_a_server_that_wants_to_know_who_asks_is_there(answering):
    _answers(answering(b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n"))


def test_a_stage_is_a_child_with_its_standard_tags(recorder, monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"metadata": {"job_submission_id": "demo-1"}}))
    parent = recorder.parent("demo", {"seed": 3})
    with recorder.stage(parent, "train", identity_tags({"id": "tiny", "revision": "r1"})) as run:
        pass
    got = run_of(recorder, run.run_id)
    assert got.info.status == "FINISHED"
    assert got.data.tags["mlflow.parentRunId"] == parent
    assert got.data.tags["draftline.stage"] == "train"
    assert got.data.tags["target.revision"] == "r1"
    assert got.data.tags["ray.job_id"] == "demo-1"
    assert got.data.tags["code_version"].startswith("0.")
    assert run_of(recorder, parent).data.tags["seed"] == "3"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("loss is nan"), "FAILED"),
        (KeyboardInterrupt(), "KILLED"),
        (SystemExit(15), "KILLED"),
        (SystemExit(2), "FAILED"),
        (SystemExit(0), "FINISHED"),
    ],
)
def test_a_run_ends_as_its_stage_did(recorder, error, status):
    with pytest.raises(type(error)), recorder.stage(recorder.parent("demo"), "train") as run:
        raise error
    got = run_of(recorder, run.run_id)
    assert got.info.status == status
    assert got.info.end_time is not None
    if isinstance(error, ValueError):
        assert got.data.tags["draftline.error"] == "ValueError: loss is nan"


def test_resuming_a_pipeline_goes_on_in_its_run_and_closes_what_a_kill_left_open(recorder, tmp_path):
    parent = recorder.parent("demo")
    killed = recorder.stage(parent, "train")
    left = killed.__enter__()  # as after kill -9: never exited
    recorder.end(parent, "FAILED")
    again = Recorder(None, "tests", tmp_path)
    assert again.parent("demo") == parent
    assert run_of(again, parent).info.status == "RUNNING"
    with again.stage(parent, "train") as run:
        assert run_of(again, left.run_id).info.status == "KILLED"
    assert run.run_id != left.run_id
    assert again.parent("another") != parent


def test_a_parent_run_ends_as_its_block_did(recorder):
    with recorder.running("demo") as run_id:
        assert run_of(recorder, run_id).info.status == "RUNNING"
    assert run_of(recorder, run_id).info.status == "FINISHED"


def test_a_config_larger_than_mlflow_params_is_kept_whole(recorder, tmp_path):
    config = {"name": "demo", "draft": {"ids": [1, 2], "text": "x" * 7000}, "many": {f"k{i}": i for i in range(150)}}
    with recorder.stage(recorder.parent("demo"), "train") as run:
        run.log_config(config)
    params = run_of(recorder, run.run_id).data.params
    assert len(params) == 153
    assert params["draft.ids"] == "[1, 2]"
    assert len(params["draft.text"]) == 6000
    assert params["draft.text"].endswith("...")
    file = recorder.client.download_artifacts(run.run_id, "config.json", str(tmp_path))
    with open(file) as f:
        assert json.load(f) == config


def test_metrics_artifacts_and_inputs_are_found_again(recorder, tmp_path):
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "a.txt").write_text("a")
    with recorder.stage(recorder.parent("demo"), "evaluate") as run:
        for step in (1, 2):
            run.log_metrics({"loss": 3.0 - step}, step=step)
        run.log_artifact(tmp_path / "report", "report")
        run.log_input("features", "f" * 64, tmp_path, "training")
    got = run_of(recorder, run.run_id)
    assert [(m.step, m.value) for m in recorder.client.get_metric_history(run.run_id, "loss")] == [(1, 2.0), (2, 1.0)]
    assert [a.path for a in recorder.client.list_artifacts(run.run_id, "report")] == ["report/a.txt"]
    (data,) = got.inputs.dataset_inputs
    assert (data.dataset.name, data.dataset.digest) == ("features", "f" * 32)
    assert data.tags[0].value == "training"
    assert got.data.tags["input.features"] == "f" * 64


def test_nothing_is_written_into_the_working_directory(tmp_path, recorder, monkeypatch):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    with Recorder(None, "tests", tmp_path).stage(recorder.parent("demo"), "x") as run:
        run.log_dict({"a": 1}, "folder/a.json")
    assert list(elsewhere.iterdir()) == []
    assert [a.path for a in recorder.client.list_artifacts(run.run_id, "folder")] == ["folder/a.json"]


@pytest.mark.parametrize(
    ("uri", "remedy"), [("sqlite:///mlflow.db", "absolute path"), ("./mlruns", "http"), (None, "output root")]
)
def test_a_store_that_would_fork_or_is_unknown_is_refused(uri, remedy):
    with pytest.raises(DraftlineError, match=remedy):
        Recorder(uri, "tests")


def test_a_server_that_does_not_answer_is_named_at_once(free_port):
    with pytest.raises(DraftlineError, match=f"127.0.0.1:{free_port}.*Start it"):
        Recorder(f"http://127.0.0.1:{free_port}", "tests")


def test_a_run_name_that_would_break_the_search_is_refused(recorder):
    with pytest.raises(DraftlineError, match="it's"):
        recorder.parent("it's")


def test_flatten_keeps_empty_groups_and_text():
    assert flatten({"a": {"b": {"c": 1}}, "d": {}, "e": "x", "f": None}) == {
        "a.b.c": "1", "d": "{}", "e": "x", "f": "null",
    }  # fmt: skip
