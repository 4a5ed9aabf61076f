"""The artifact of regeneration: conversations whose last turns are the target's own, and what became of each prompt.

    conversations.jsonl.zst   {"messages", "source"} of every answered prompt, in the order of the prompts' rows
    answers.jsonl             of every prompt asked {"row", "finish_reason", "error", "retry", "prompt_tokens",
                              "response_tokens", "clipped"}, in the same order

Kind "conversations": its config is how was asked (sampling, system prompt, number of prompts), its input the prompts.
The first file is an ordinary one of conversations; from the manifest beside it a corpus knows who answered.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import zstandard

from pipeline import artifact
from pipeline.corpus.conversations import read_conversations
from pipeline.errors import ArtifactError, DraftlineError

KIND = "conversations"
CONVERSATIONS = "conversations.jsonl.zst"
_ANSWERS = "answers.jsonl"
_KEPT = ("row", "finish_reason", "error", "retry", "prompt_tokens", "response_tokens", "clipped")


def write_answers(folder: Path, rows: Iterable[Mapping[str, Any]]) -> tuple[dict[str, int], dict[str, Any]]:
    """Writes the artifact's two files into a folder that is there.

    Args:
        rows: as `Regenerator` returns them, in any order; of each prompt one.

    Returns:
        counts: rows (answered), failed, retry (those of both that the next run asks again), clipped (answers that had
        less room than they were to have), clipped_cut (those of them that took it all), pool_cut (those of these that
        are asked again: it was the KV pool that left less), prompt_tokens, response_tokens. info: finish_reasons,
        failed [{row, error}].

    Raises:
        DraftlineError: no row was answered.
    """
    ordered = sorted(rows, key=lambda r: int(r["row"]))
    failed = [{"row": int(r["row"]), "error": str(r["error"])} for r in ordered if r["error"]]
    answered = [r for r in ordered if not r["error"]]
    clipped = [r for r in answered if r["clipped"]]
    if not answered:
        why = f" ({len(failed)} failed; the first, row {failed[0]['row']}: {failed[0]['error']})" if failed else ""
        raise DraftlineError(f"No prompt was answered, so there are no conversations to keep{why}.")
    lines = "".join(
        json.dumps({"messages": json.loads(r["messages"]), "source": r["source"]}, ensure_ascii=False) + "\n"
        for r in answered
    )
    (folder / _ANSWERS).unlink(missing_ok=True)  # it is there only where both are whole and of one making
    (folder / CONVERSATIONS).write_bytes(zstandard.ZstdCompressor(level=19).compress(lines.encode()))
    artifact.write_text(folder / _ANSWERS, "".join(json.dumps({k: r[k] for k in _KEPT}) + "\n" for r in ordered))
    counts = {
        "rows": len(answered),
        "failed": len(failed),
        "retry": sum(int(r["retry"]) for r in ordered),
        "clipped": len(clipped),
        "clipped_cut": sum(r["finish_reason"] == "length" for r in clipped),
        "pool_cut": sum(int(r["retry"]) for r in answered),
        "prompt_tokens": sum(int(r["prompt_tokens"]) for r in answered),
        "response_tokens": sum(int(r["response_tokens"]) for r in answered),
    }
    reasons = Counter(str(r["finish_reason"]) for r in answered)
    return counts, {"finish_reasons": dict(sorted(reasons.items())), "failed": failed}


def read_answers(folder: Path) -> list[dict[str, Any]]:
    """The rows that `write_answers` was given, in the order of their numbers; failed ones have `messages` "".

    Nothing is verified: of an artifact, `artifact.load` does that. Where nothing was written to its end there are none.
    """
    if not (folder / _ANSWERS).is_file():
        return []
    rows: list[dict[str, Any]] = [json.loads(line) for line in (folder / _ANSWERS).read_text().splitlines()]
    answered = [r for r in rows if not r["error"]]
    for row, said in zip(answered, read_conversations(folder / CONVERSATIONS, []), strict=True):
        row["messages"] = json.dumps([m.as_dict() for m in said.messages], ensure_ascii=False)
        row["source"] = said.source
    return [{"messages": "", "source": "", **r} for r in rows]


def read_provenance(path: Path | str) -> artifact.Manifest | None:
    """The manifest of the regeneration that a file of conversations comes from, after checking the file against it.

    None where no such manifest is beside it. The artifact's other files may be missing: a copy of the conversations and
    their manifest is enough.

    Raises:
        ArtifactError: the file is not the one the manifest describes.
    """
    path = Path(path)
    try:
        manifest = artifact.Manifest(**json.loads((path.parent / artifact.MANIFEST).read_text()))
    except (OSError, ValueError, TypeError):
        return None  # somebody else's file of that name
    if manifest.kind != KIND or path.name not in manifest.files:
        return None
    if artifact.sha256_file(path) != manifest.files[path.name]["sha256"]:
        raise ArtifactError(
            f"{path} was altered: its SHA-256 is not that in {artifact.MANIFEST} beside it. Regenerate it, or remove "
            f"{artifact.MANIFEST} if the change was meant."
        )
    return manifest
