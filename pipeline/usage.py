"""What a job's `--help` prints: what it does, an example, and the settings that matter most with their defaults."""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.config import PipelineConfig

WIDTH = 100


def usage(about: str, job: str, groups: Sequence[str], page: str, conf: Path) -> str:
    """The help of a job.

    Args:
        about: the job's docstring: what it does, and a command line.
        groups: dotted groups of `PipelineConfig` whose settings are listed ("trainer", "corpus.regenerate").
        page: of docs/.
        conf: the folder of Hydra's groups.
    """
    experiments = ", ".join(sorted(f.stem for f in (conf / "experiment").glob("*.yaml")))
    lines = [
        f"usage: python jobs/{job}.py [experiment=NAME] [name=value ...]",
        "",
        about.strip(),
        "",
        _filled(f"experiments: {experiments}"),
        _filled("where: name (of the run), output_root, cache_dir; tracking.uri, tracking.model_name"),
    ]
    for group in groups:
        cls = _group(group)
        options = sorted(f.stem for f in (conf / group).glob("*.yaml")) if (conf / group).is_dir() else []
        shipped = f" (shipped: {', '.join(f'{group}={o}' for o in options)})" if options else ""
        lines += ["", _filled(f"{group}{shipped}")]
        lines.append(textwrap.indent(inspect.cleandoc(cls.__doc__ or ""), "  "))
        lines.append(_filled("  " + " ".join(f"{group}.{f.name}={_default(f)}" for f in _plain(cls)), "    "))
    pages = "docs/jobs.md" if page == "jobs" else f"docs/{page}.md, docs/jobs.md"
    lines += [
        "",
        _filled(
            "Every other setting is taken too. Shown are the defaults of pipeline/config.py; conf/ and the experiment "
            f"change some. A mistyped setting is answered with the nearest. More: {pages}"
        ),
    ]
    return "\n".join(lines)


def _filled(text: str, then: str = "  ") -> str:
    return textwrap.fill(
        text, WIDTH, subsequent_indent=then, break_on_hyphens=False, break_long_words=False, drop_whitespace=True
    )


def _group(dotted: str) -> Any:
    cls: Any = PipelineConfig
    for part in dotted.split("."):
        cls = typing.get_type_hints(cls)[part]
    return cls


def _plain(cls: Any) -> list[dataclasses.Field[Any]]:
    hints = typing.get_type_hints(cls)
    return [f for f in dataclasses.fields(cls) if not dataclasses.is_dataclass(hints[f.name])]


def _default(field: dataclasses.Field[Any]) -> str:
    """As it is written on a command line."""
    value = field.default
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return "''" if value == "" else str(value).replace(" ", "")
