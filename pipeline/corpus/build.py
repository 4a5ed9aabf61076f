"""A file of conversations -> the corpus artifact: token rows, split in train and held out.

    rows-train.parquet, rows-heldout.parquet   sample_id, source, input_ids, loss_mask, prompt_length
    quarantine.jsonl                           {"row", "reason", "raw"} of every row that was set aside
    token_counts.npy                           int64[V]: how often each token is spoken in the TRAIN rows

The split depends on the text of the first user message alone: answers to one prompt never straddle it, and a
prompt keeps its side when the corpus grows.
"""

from __future__ import annotations

import bisect
import contextlib
import dataclasses
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import artifact
from pipeline.corpus.answers import read_provenance
from pipeline.corpus.conversations import Conversation, Message, Quarantined, read_conversations, with_system_prompt
from pipeline.corpus.rows import ChatFormat, RowError, TokenRow
from pipeline.errors import DraftlineError
from pipeline.identity import same_target

if TYPE_CHECKING:
    from pipeline.config import CorpusConfig

Split = Literal["train", "heldout"]
SPLITS: tuple[Split, ...] = ("train", "heldout")
SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("source", pa.string()),
        ("input_ids", pa.list_(pa.int32())),
        ("loss_mask", pa.list_(pa.bool_())),
        ("prompt_length", pa.int32()),
    ]
)
_ROW_GROUP = 1024
_PROMPTS = "prompts-heldout.jsonl"


def build_corpus(
    config: CorpusConfig,
    tokenizer: Any,
    identity: Mapping[str, str] | None,
    out: Path | str,
    *,
    system_prompt: str | None = None,
    begin: Callable[[], object] = lambda: None,
) -> artifact.Manifest:
    """Makes the corpus artifact at `out`, or returns the one there if it was made from the same things.

    Args:
        config: reads source, max_length, heldout_fraction, max_rows, min_loss_tokens, seed.
        tokenizer: the target's, with the chat template that serving will use.
        identity: the target's identity (`TargetIdentity.as_dict()`).
        system_prompt: put before conversations that have no system message.
        begin: called when there is work to do.

    Returns:
        Manifest of kind "corpus". counts: {train,heldout}_{rows,tokens,loss_tokens}, and of the rows left out
        quarantined, duplicates, dropped_no_loss, dropped_few_loss; truncated counts rows kept but cut to
        max_length, length_cut those whose last answer the target did not finish. info: source, sources (rows by
        source), quarantine_reasons, vocab_size, regenerated_by (the target that wrote the answers, where the source
        tells), foreign (what of that target is not this one's, see `foreign`).

    Raises:
        DraftlineError: a source that cannot be read, nothing usable in it, or an empty split.
        TemplateError: the chat template cannot mark assistant turns.
        ArtifactError: the source's own manifest says that the file was altered.
    """
    source = Path(config.source)
    settings = _settings(config, system_prompt)
    if not source.is_file():
        raise DraftlineError(f"corpus.source is {str(source)!r}: no such file.")
    regenerated = read_provenance(source)
    author = regenerated.target if regenerated else None
    chat = ChatFormat(tokenizer)
    target = dict(identity) if identity else None
    inputs = {
        "source": artifact.sha256_file(source),
        "chat_template": chat.template_digest,
        **({"tokenizer": target["tokenizer_digest"]} if target and "tokenizer_digest" in target else {}),
    }
    if (found := artifact.current(out, "corpus", config=settings, inputs=inputs)) and same_target(found.target, target):
        return found
    begin()
    with artifact.create(out, "corpus", config=settings, inputs=inputs, target=target) as staging:
        with _Writer(staging.path, len(tokenizer)) as writer:
            quarantine: list[Quarantined] = []
            prompts: list[dict[str, Any]] = []
            for conversation in read_conversations(source, quarantine):
                if config.max_rows and writer.rows >= config.max_rows:
                    break
                asked = conversation.messages
                messages = with_system_prompt(asked, system_prompt)
                conversation = dataclasses.replace(conversation, messages=messages)
                try:
                    row = chat.row(conversation, config.max_length)
                except RowError as e:
                    raw = json.dumps({"messages": [m.as_dict() for m in asked]}, ensure_ascii=False)
                    quarantine.append(Quarantined(conversation.row, str(e), raw[:2000]))
                    continue
                split = split_of(conversation, config.heldout_fraction, config.seed)
                finished = all(m.ended for m in conversation.messages)
                if writer.add(row, split, config.min_loss_tokens, finished) and split == "heldout":
                    first = next(i for i, m in enumerate(asked) if m.role == "assistant")
                    prompts.append({"sample_id": row.sample_id, "messages": [m.as_dict() for m in asked[:first]]})
        reasons = Counter(q.reason for q in quarantine)
        with (staging.path / "quarantine.jsonl").open("w", encoding="utf-8") as f:
            for q in sorted(quarantine, key=lambda q: q.row):
                f.write(json.dumps(dataclasses.asdict(q), ensure_ascii=False) + "\n")
        with (staging.path / _PROMPTS).open("w", encoding="utf-8") as f:
            f.writelines(json.dumps(p, ensure_ascii=False) + "\n" for p in prompts)
        np.save(staging.path / "token_counts.npy", writer.token_counts)
        staging.counts.update(writer.counts, quarantined=len(quarantine))
        _require_rows(staging.counts, reasons, config)
        staging.info.update(
            source=str(config.source),
            sources={name: dict(sorted(c.items())) for name, c in writer.sources.items()},
            quarantine_reasons=dict(reasons.most_common(20)),
            vocab_size=len(tokenizer),
            regenerated_by=author,
            foreign=foreign(author, target),
        )
    return artifact.load(out, "corpus", verify=False)


def foreign(written_by: Mapping[str, str] | None, target: Mapping[str, str] | None) -> list[str]:
    """What of the target that wrote a corpus' answers is not the corpus' own target's: of `weights` and `tokenizer`
    (chat template included). Empty where it is that target, or where either is not known.

    An id is a path's last part and a revision may be a branch: weights are told apart by their digest.
    """
    fields = {"weights": "weight_digest", "tokenizer": "tokenizer_digest"}
    by, ours = written_by or {}, target or {}
    return [name for name, field in fields.items() if field in by and field in ours and by[field] != ours[field]]


def read_table(corpus_dir: Path | str, split: Split) -> pa.Table:
    """The rows of one split as an Arrow table (columns: `SCHEMA`), in file order.

    Raises:
        ArtifactError: no corpus there, or a file of it is missing, truncated or altered.
    """
    artifact.load(corpus_dir, "corpus")
    return pq.read_table(Path(corpus_dir) / _rows_file(split), schema=SCHEMA)


def read_rows(corpus_dir: Path | str, split: Split) -> list[TokenRow]:
    """The rows of one split, in file order.

    Raises:
        ArtifactError: as `read_table`.
    """
    return [
        _token_row(row) for batch in read_table(corpus_dir, split).to_batches(_ROW_GROUP) for row in batch.to_pylist()
    ]


class RowReader:
    """The rows of one split by number, read when they are asked for: memory and time follow what is asked, not the
    corpus.

    Sizes are checked here. Digests are not, which would read everything: whoever gives a corpus to many readers
    verifies it once (`artifact.load`).

    Raises:
        ArtifactError: no corpus there, or a file of it is missing or truncated.
    """

    def __init__(self, corpus_dir: Path | str, split: Split) -> None:
        artifact.load(corpus_dir, "corpus", verify=False)
        self._file = pq.ParquetFile(Path(corpus_dir) / _rows_file(split), memory_map=True)
        groups = range(self._file.metadata.num_row_groups)
        self._ends = list(itertools.accumulate(self._file.metadata.row_group(g).num_rows for g in groups))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def rows(self, numbers: Sequence[int]) -> list[TokenRow]:
        """Rows by number, in the order asked for; a number may be asked for twice.

        Raises:
            IndexError: no such row.
        """
        if outside := [n for n in numbers if not 0 <= n < len(self)]:
            raise IndexError(f"row {outside[0]} of a corpus split with {len(self)} rows")
        by_group: dict[int, list[int]] = {}
        for n in numbers:
            by_group.setdefault(bisect.bisect_right(self._ends, n), []).append(n)
        found: dict[int, TokenRow] = {}
        for group, wanted in by_group.items():
            start = self._ends[group - 1] if group else 0
            table = self._file.read_row_group(group).take([n - start for n in wanted])
            found |= dict(zip(wanted, map(_token_row, table.to_pylist()), strict=True))
        return [found[n] for n in numbers]


def _rows_file(split: Split) -> str:
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}, not one of {SPLITS}")
    return f"rows-{split}.parquet"


def _token_row(row: dict[str, Any]) -> TokenRow:
    return TokenRow(
        sample_id=row["sample_id"],
        input_ids=np.asarray(row["input_ids"], dtype=np.int32),
        loss_mask=np.asarray(row["loss_mask"], dtype=bool),
        source=row["source"],
        prompt_length=row["prompt_length"],
    )


def count_bigrams(corpus_dir: Path | str, most: int = 2**24) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every pair of a token and the supervised one after it in the training rows, ascending, and how often it occurs:
    (previous, next, count), int64[n] each.

    Args:
        most: pairs that are held uncounted at once; beside the counts they are all that takes memory.
    Raises:
        ArtifactError: as `read_table`.
    """
    artifact.load(corpus_dir, "corpus")
    keys, counts = np.empty(0, np.int64), np.empty(0, np.int64)
    waiting: list[np.ndarray] = []

    def merge() -> tuple[np.ndarray, np.ndarray]:
        new, n = np.unique(np.concatenate(waiting), return_counts=True) if waiting else (keys[:0], counts[:0])
        waiting.clear()
        merged, place = np.unique(np.concatenate((keys, new)), return_inverse=True)
        total = np.bincount(place, np.concatenate((counts, n)), minlength=len(merged)).astype(np.int64)
        return merged, total

    file = pq.ParquetFile(Path(corpus_dir) / _rows_file("train"), memory_map=True)
    for batch in file.iter_batches(_ROW_GROUP, columns=["input_ids", "loss_mask"]):
        lists = batch.column("input_ids")
        ids = lists.flatten().to_numpy().astype(np.int64)
        asked = batch.column("loss_mask").flatten().to_numpy(zero_copy_only=False).astype(bool)
        asked[lists.offsets.to_numpy()[:-1] - lists.offsets[0].as_py()] = False  # nothing is before a row's first
        at = asked.nonzero()[0]
        waiting.append(ids[at - 1] << 32 | ids[at])
        if sum(map(len, waiting)) >= max(most, len(keys)):
            keys, counts = merge()
    keys, counts = merge()
    return keys >> 32, keys & 0xFFFFFFFF, counts


def read_heldout_prompts(corpus_dir: Path | str) -> dict[str, list[Message]]:
    """By sample id, what was asked in the held-out rows: the messages before the first answer, as they came (no system
    prompt of the configuration's among them).

    Raises:
        ArtifactError: as `read_table`.
    """
    artifact.load(corpus_dir, "corpus")
    # Not splitlines: a prompt may hold line separators that JSON leaves as they are.
    lines = (Path(corpus_dir) / _PROMPTS).read_text(encoding="utf-8").split("\n")[:-1]
    return {p["sample_id"]: [Message(m["role"], m["content"]) for m in p["messages"]] for p in map(json.loads, lines)}


def read_token_counts(corpus_dir: Path | str) -> np.ndarray:
    """int64[V], V the tokenizer's length: how often each token is spoken by the assistant in the train rows.

    Of the corpus only this file is hashed: every training worker asks for it, at every start.

    Raises:
        ArtifactError: no corpus there, a file of it is missing or truncated, or this one altered.
    """
    return np.load(artifact.load_file(corpus_dir, "corpus", "token_counts.npy"))


def split_of(conversation: Conversation, heldout_fraction: float, seed: int = 0) -> Split:
    """The side a conversation falls on, from its first user message's text (outer whitespace ignored) and the seed."""
    prompt = next(m.content for m in conversation.messages if m.role == "user").strip()
    digest = hashlib.sha256(f"{seed}\0{prompt}".encode()).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") < heldout_fraction * 2**64 else "train"


class _Writer:
    """Streams rows to the two parquet files and counts them."""

    def __init__(self, directory: Path, vocab_size: int):
        self.directory = directory
        self.token_counts = np.zeros(vocab_size, dtype=np.int64)
        self.counts: dict[str, int] = dict.fromkeys(
            [f"{split}_{noun}" for split in SPLITS for noun in ("rows", "tokens", "loss_tokens")]
            + ["duplicates", "dropped_no_loss", "dropped_few_loss", "truncated", "length_cut"],
            0,
        )
        self.sources: dict[Split, Counter[str]] = {split: Counter() for split in SPLITS}
        self._seen: set[bytes] = set()
        self._pending: dict[Split, list[TokenRow]] = {split: [] for split in SPLITS}

    @property
    def rows(self) -> int:
        return self.counts["train_rows"] + self.counts["heldout_rows"]

    def __enter__(self) -> Self:
        self._stack = contextlib.ExitStack()
        self._files = {
            split: self._stack.enter_context(pq.ParquetWriter(self.directory / f"rows-{split}.parquet", SCHEMA))
            for split in SPLITS
        }
        return self

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            for split in SPLITS:
                self._flush(split)
        self._stack.close()

    def add(self, row: TokenRow, split: Split, min_loss_tokens: int, finished: bool) -> bool:
        """Counts a row, and keeps it unless it has too few spoken tokens or is there already."""
        spoken = row.input_ids[row.loss_mask]
        if not len(spoken):
            self.counts["dropped_no_loss"] += 1
            return False
        if len(spoken) < min_loss_tokens:
            self.counts["dropped_few_loss"] += 1
            return False
        key = bytes.fromhex(row.sample_id)
        if key in self._seen:
            self.counts["duplicates"] += 1
            return False
        self._seen.add(key)
        self.counts["truncated"] += row.cut
        self.counts["length_cut"] += not finished
        self.counts[f"{split}_rows"] += 1
        self.counts[f"{split}_tokens"] += len(row.input_ids)
        self.counts[f"{split}_loss_tokens"] += len(spoken)
        self.sources[split][row.source] += 1
        if split == "train":
            np.add.at(self.token_counts, spoken, 1)
        self._pending[split].append(row)
        if len(self._pending[split]) >= _ROW_GROUP:
            self._flush(split)
        return True

    def _flush(self, split: Split) -> None:
        if rows := self._pending[split]:
            columns = {
                "sample_id": [r.sample_id for r in rows],
                "source": [r.source for r in rows],
                "input_ids": [r.input_ids for r in rows],
                "loss_mask": [r.loss_mask for r in rows],
                "prompt_length": [r.prompt_length for r in rows],
            }
            self._files[split].write_table(pa.table(columns, schema=SCHEMA))
            rows.clear()


def _settings(config: CorpusConfig, system_prompt: str | None) -> dict[str, Any]:
    """What shapes the corpus, the source's place left out: moving the file does not make another corpus."""
    if not 0.0 <= config.heldout_fraction < 1.0:
        raise DraftlineError(f"corpus.heldout_fraction is {config.heldout_fraction}; it must be in [0, 1).")
    if config.max_length < 2:
        raise DraftlineError(f"corpus.max_length is {config.max_length}; it must be at least 2 tokens.")
    names = ("max_length", "heldout_fraction", "max_rows", "min_loss_tokens", "seed")
    return {**{name: getattr(config, name) for name in names}, "system_prompt": system_prompt}


def _require_rows(counts: dict[str, int], reasons: Counter[str], config: CorpusConfig) -> None:
    left_out = {k: counts[k] for k in ("quarantined", "duplicates", "dropped_no_loss", "dropped_few_loss") if counts[k]}
    if not counts["train_rows"] and not counts["heldout_rows"]:
        why = f" The commonest reason: {reasons.most_common(1)[0][0]}." if reasons else ""
        raise DraftlineError(
            f"No usable row in {config.source}: {left_out}.{why} Rows need {config.min_loss_tokens} assistant tokens "
            f"(corpus.min_loss_tokens) within the first {config.max_length} (corpus.max_length)."
        )
    if not counts["train_rows"]:
        raise DraftlineError(
            f"All {counts['heldout_rows']} usable rows of {config.source} fell in the held-out split. Give more "
            f"conversations, or lower corpus.heldout_fraction (now {config.heldout_fraction})."
        )
    if config.heldout_fraction and not counts["heldout_rows"]:
        raise DraftlineError(
            f"None of the {counts['train_rows']} usable rows of {config.source} fell in the held-out split. Give more "
            f"conversations, raise corpus.heldout_fraction (now {config.heldout_fraction}), or set it to 0 to go "
            "without."
        )
