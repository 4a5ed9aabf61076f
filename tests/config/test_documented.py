"""Command lines that README and docs give are ones that compose."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys

import pytest

from jobs import sweep
from pipeline.entry import CONF, compose, run

ROOT = CONF.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
JOBS = sorted(f.stem for f in (ROOT / "jobs").glob("[a-z]*.py"))


def command_lines() -> list[tuple[str, str, list[str]]]:
    """(page, job, settings) of every command that runs a job; placeholders left out."""
    found = []
    for page in PAGES:
        text = re.sub(r"\\\n\s*", " ", page.read_text())
        for job, rest in re.findall(r"python jobs/(\w+)\.py((?: +[^\n`]+)?)", text):
            words = [w for w in shlex.split(rest.split("  #")[0].split(" [")[0].replace("...", "")) if w != "--help"]
            found.append((page.name, job, words))
    return found


def test_documented_commands_compose() -> None:
    lines = command_lines()
    assert {"train", "pipeline", "plan", "export", "sweep"} <= {job for _, job, _ in lines}
    for page, job, words in lines:
        assert job in JOBS, (page, job)
        if job == "sweep":
            sweep.parse(words).check()
        elif "trainer.stps=5" not in words and words != ["experiment="]:
            own = [w for w in ("corpus.source=x", "corpus.regenerate.prompts=x") if not any(w[:-1] in o for o in words)]
            compose([*words, *own]), (page, job)


def test_the_pages_say_where_commands_run() -> None:
    for page in ("README.md", "docs/jobs.md"):
        assert "make env && source .venv/bin/activate" in (ROOT / page).read_text()
    readme = (ROOT / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in readme, f"{page.name} is not in README's list"


def test_a_job_needs_no_path_set_for_it() -> None:
    """As in a fresh clone: jobs that are made of others find them beside the package."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "jobs/sweep.py", "trainer.lrr=1,2", "experiment=smoke"]
    said = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert said.returncode == 2, said.stderr
    assert "Did you mean 'lr'?" in said.stderr


@pytest.mark.parametrize("job", JOBS)
def test_every_job_says_what_it_is(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    import importlib

    module = importlib.import_module(f"jobs.{job}")
    if job == "sweep":
        assert module.main(["--help"]) == 0
    else:
        options = re.search(r"settings=(\([^)]*\))", (ROOT / "jobs" / f"{job}.py").read_text())
        assert options, "no settings are named for its --help"
        main = getattr(module, "main", None) or module.stage
        assert run(main, job, ["experiment=nowhere", "--help"], settings=eval(options.group(1))) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"usage: python jobs/{job}.py [experiment=NAME]")
    assert (module.__doc__ or "").splitlines()[0] in said and f"jobs/{job}.py experiment=" in said
    assert "experiments: " in said and "demo" in said and "docs/jobs.md" in said
    assert max(map(len, said.splitlines())) <= 120
