"""An artifact is whole under its name or isn't there, and what a reader gets is what was written."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline import __version__, artifact
from pipeline.errors import ArtifactError

ROOT = Path(__file__).resolve().parent.parent

# Replaces an artifact and is killed at the n-th rename of a directory.
WRITER = """
import os, signal, sys
from pathlib import Path
from pipeline import artifact
out, kill_at, renames = Path(sys.argv[1]), int(sys.argv[2]), 0
rename = Path.rename
def counted(self, to):
    global renames
    renames += 1
    if renames == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, to)
Path.rename = counted
with artifact.create(out, "thing", config={"n": 2}) as staging:
    (staging.path / "data").write_text("new")
"""

# Stages half of an artifact, says so, and waits to be killed or told to go on.
SLOW_WRITER = """
import sys
from pathlib import Path
from pipeline import artifact
with artifact.create(sys.argv[1], "thing", config={"n": 2}, resumable=True) as staging:
    (staging.path / "data").write_text("half")
    print("staged", flush=True)
    sys.stdin.readline()
    (staging.path / "data").write_text("whole")
"""


def write(out: Path, n: int, text: str) -> None:
    with artifact.create(out, "thing", config={"n": n}) as staging:
        (staging.path / "data").write_text(text)


def current(out: Path, n: int) -> bool:
    return artifact.current(out, "thing", config={"n": n}, inputs={}) is not None


@pytest.mark.parametrize("kill_at", [1, 2])
def test_a_kill_while_one_is_replaced_loses_neither(tmp_path: Path, kill_at: int) -> None:
    out = tmp_path / "thing"
    write(out, 1, "old")
    killed = subprocess.run([sys.executable, "-c", WRITER, str(out), str(kill_at)], env=os.environ)
    assert killed.returncode == -signal.SIGKILL
    assert current(out, 2), "the new one was whole: the next run of the stage takes it"
    assert (out / "data").read_text() == "new"
    assert artifact.load(out, "thing").config == {"n": 2}
    assert [p.name for p in tmp_path.iterdir()] == ["thing"]


def test_an_old_one_comes_back_when_its_successor_was_not_whole(tmp_path: Path) -> None:
    out = tmp_path / "thing"
    write(out, 1, "old")
    out.rename(tmp_path / ".thing.old")
    (tmp_path / ".thing.staging").mkdir()
    assert current(out, 1) and (out / "data").read_text() == "old"


def test_a_failed_writer_leaves_what_was_there(tmp_path: Path) -> None:
    out = tmp_path / "thing"
    write(out, 1, "old")
    with pytest.raises(OSError), artifact.create(out, "thing", config={"n": 2}) as staging:
        (staging.path / "data").write_text("half")
        raise OSError("disk full")
    assert current(out, 1) and [p.name for p in tmp_path.iterdir()] == ["thing"]


def slow_writer(out: Path) -> subprocess.Popen[str]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", SLOW_WRITER, str(out)], text=True, **pipes)
    assert process.stdout is not None and process.stdout.readline() == "staged\n"
    return process


def test_a_second_writer_is_refused_and_the_first_loses_nothing(tmp_path: Path) -> None:
    out = tmp_path / "thing"
    write(out, 1, "old")
    first = slow_writer(out)
    for n in (2, 3):  # the same artifact, and another
        with pytest.raises(ArtifactError, match=rf"thing is being written by another process \({first.pid} on .*Wait"):
            write(out, n, "mine")
    assert current(out, 1) and not current(out, 2) and (out / "data").read_text() == "old"
    first.communicate("\n")
    assert first.returncode == 0
    assert current(out, 2) and (out / "data").read_text() == "whole"
    assert [p.name for p in tmp_path.iterdir()] == ["thing"]
    write(out, 3, "new")
    assert current(out, 3)


def test_a_killed_writer_locks_nobody_out_and_what_it_staged_is_gone_on_with(tmp_path: Path) -> None:
    out = tmp_path / "thing"
    first = slow_writer(out)
    first.kill()
    first.wait()
    with artifact.create(out, "thing", config={"n": 2}, resumable=True) as staging:
        assert (staging.path / "data").read_text() == "half"
    assert current(out, 2) and [p.name for p in tmp_path.iterdir()] == ["thing"]


def test_a_writer_that_waited_on_a_file_taken_away_locks_the_one_that_counts(tmp_path: Path, monkeypatch) -> None:
    """The first writer unlinks its lock between this one's opening and locking it."""
    out, flock, taken = tmp_path / "thing", fcntl.flock, []

    def late(lock: Any, how: int) -> None:
        if not taken:
            taken.append(tmp_path / ".thing.writer")
            taken[0].unlink()
        flock(lock, how)

    monkeypatch.setattr("pipeline.lock.fcntl.flock", late)
    with artifact.create(out, "thing", config={"n": 1}):
        assert taken[0].exists()
        with pytest.raises(ArtifactError, match="being written"):
            write(out, 2, "mine")


def test_what_was_altered_or_cut_short_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "thing"
    write(out, 1, "right")
    (out / "data").write_text("wrong")
    with pytest.raises(ArtifactError, match="was altered"):
        artifact.load(out, "thing")
    (out / "data").write_text("ri")
    with pytest.raises(ArtifactError, match="2 bytes, the manifest says 5"):
        artifact.load(out, "thing", verify=False)
    with pytest.raises(ArtifactError, match="holds a 'thing' artifact"):
        artifact.load(out, "corpus")


def version_of(tree: Path) -> str:
    """What the code in a tree calls itself, as a plain `ray job submit` runs it: nobody tells it."""
    env = {k: v for k, v in os.environ.items() if k != "DRAFTLINE_CODE_VERSION"} | {"PYTHONPATH": str(tree)}
    program = "import pipeline.artifact as a; print(a.__file__, a.code_version())"
    said = subprocess.run(
        [sys.executable, "-c", program], env=env, cwd=tree, capture_output=True, text=True, check=True
    )
    file, version = said.stdout.split()
    assert Path(file).is_relative_to(tree)
    return version


def test_code_without_its_git_is_known_by_its_sources(tmp_path: Path) -> None:
    tree = tmp_path / "repository" / "working_dir"
    for folder in ("pipeline", "kernels", "conf", "jobs"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__", "*.zst"))
    version = version_of(tree)
    assert version == f"{__version__}+src.{artifact.source_digest(ROOT)[:12]}", "the checkout it was copied from"
    for command in (["init"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", *command], cwd=tree.parent, check=True, capture_output=True)
    assert version_of(tree) == version, "the commit around it is not its own"
    with (tree / "conf" / "trainer" / "cpu.yaml").open("a") as f:
        f.write("lr: 0.5\n")
    assert version_of(tree) != version


def test_a_checkout_is_known_by_its_commit(tmp_path: Path) -> None:
    (tmp_path / "pipeline").mkdir()
    for name in ("__init__.py", "artifact.py", "errors.py", "identity.py", "lock.py"):
        shutil.copy(ROOT / "pipeline" / name, tmp_path / "pipeline")
    for command in (["init"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-m", "x"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True, capture_output=True)
    assert re.fullmatch(re.escape(__version__) + r"\+g[0-9a-f]{12}", version_of(tmp_path))


def test_a_link_to_another_runs_artifact_is_replaced_as_often_as_it_takes(tmp_path: Path) -> None:
    """And what it points to stays."""
    theirs, out = tmp_path / "theirs" / "thing", tmp_path / "mine" / "thing"
    write(theirs, 1, "shared")
    out.parent.mkdir()
    out.symlink_to(theirs)
    for value in (2, 3):
        write(out, value, f"own {value}")
        assert (out / "data").read_text() == f"own {value}" and not out.is_symlink()
    assert (theirs / "data").read_text() == "shared"
