"""The parity gate passes drafts that are served as they were trained, and catches five faults that would ruin one."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import artifact
from pipeline.config import CorpusConfig, ParityConfig, TargetConfig
from pipeline.corpus.build import build_corpus, read_rows
from pipeline.decoding import Completion, Engine, Request
from pipeline.decoding.proposers.dspark import DSparkProposer
from pipeline.decoding.proposers.eagle3 import Eagle3Proposer
from pipeline.drafts.checkpoint import save_draft
from pipeline.errors import DraftlineError
from pipeline.evaluation.benchmark import Arm, block_proposer, collect_rounds, pick_prompts, proposers, run_arms
from pipeline.evaluation.parity import ParityError, check_parity, decode, require_parity
from pipeline.features.forward import feature_rows
from pipeline.features.store import shard_name, write_shard
from pipeline.target import load_target, tiny
from tests.drafts.samples import small_draft
from tests.evaluation.conftest import BENCHMARK, ENGINE, TARGET, Places
from tests.training.test_step import KINDS

PARITY = ParityConfig(prompts=6, max_new_tokens=24)
ASKED = {k: KINDS[k] for k in ("vanilla", "rnn", "windows", "dflash", "eagle3", "own matrices")}


@dataclasses.dataclass
class Trained:
    """A draft of the tiny target with the corpus and the features it would have been trained on."""

    places: Places
    features: Path
    root: Path

    def check(self, draft: Path, target: TargetConfig = TARGET, features: Path | None = None) -> dict[str, Any]:
        out = self.root / "parity"
        check_parity(
            draft, target, self.places.corpus, features or self.features, ENGINE, PARITY, out, self.places.cache
        )
        return json.loads((out / "parity.json").read_text())


def failed(content: dict[str, Any]) -> set[str]:
    assert content["passed"] is not any(not c["passed"] for c in content["checks"])
    return {c["name"] for c in content["checks"] if not c["passed"]}


def store(target: Any, places: Places, out: Path, change: Any = lambda row: row) -> Path:
    rows = [r for r in feature_rows(target, read_rows(places.corpus, "train")[:8], [0, 2], 512) if r is not None]
    rows = [change(r) for r in rows]
    with artifact.create(out, "features", config={}, inputs={}, target=target.identity.as_dict()) as staging:
        write_shard(staging.path / shard_name(0), rows, rows[0].taps.shape[1], rows[0].last_hidden.shape[1])
        tokens = sum(len(r.input_ids) for r in rows)
        staging.info.update(
            target_layer_ids=[0, 2],
            hidden_size=target.hidden_size,
            shards=[{"name": shard_name(0), "rows": len(rows), "tokens": tokens}],
        )
    return out


@pytest.fixture
def trained(places: Places, tmp_path: Path) -> Trained:
    return Trained(places, store(load_target(TARGET, places.cache), places, tmp_path / "features"), tmp_path)


def draft_of(places: Places, out: Path, like: TargetConfig = TARGET, **kind: Any) -> Path:
    target = load_target(like, places.cache)
    save_draft(
        out,
        small_draft(target, vocabulary=0, **kind),
        target=target.identity.as_dict(),
        config={},
        inputs={},
        info={"steps": 0},
    )
    return out


@pytest.mark.parametrize("kind", ASKED)
def test_a_draft_that_is_served_as_it_was_trained_passes(trained: Trained, kind: str) -> None:
    draft = draft_of(trained.places, trained.root / "draft", **ASKED[kind])
    content = trained.check(draft)
    assert failed(content) == set()
    names = {c["name"] for c in content["checks"]}
    assert {"prompts", "features", "target tokens", "draft logits", "sampled acceptance 1"} <= names
    assert content["positions"][0]["sampled"]["slots"] > 50
    require_parity(trained.root / "parity", artifact.load(draft, "draft").digest)


@pytest.mark.parametrize("kind", ["rnn", "dflash", "eagle3", "own matrices"])
def test_a_draft_of_a_16_bit_target_passes_too(places: Places, tmp_path: Path, kind: str) -> None:
    low = dataclasses.replace(TARGET, dtype="bfloat16")
    features = store(load_target(low, places.cache), places, tmp_path / "features")
    draft = draft_of(places, tmp_path / "draft", low, **ASKED[kind])
    assert failed(Trained(places, features, tmp_path).check(draft, low)) == set()


@pytest.mark.parametrize(("kind", "proposer"), [("vanilla", DSparkProposer), ("eagle3", Eagle3Proposer)])
def test_a_layer_id_off_by_one_is_caught(trained: Trained, monkeypatch: Any, kind: str, proposer: Any) -> None:
    made = proposer.__init__

    def shifted(self: Any, *args: Any, **options: Any) -> None:
        made(self, *args, **options)
        self.layer_ids = [i + 1 for i in self.layer_ids]

    monkeypatch.setattr(proposer, "__init__", shifted)
    content = trained.check(draft_of(trained.places, trained.root / "draft", **ASKED[kind]))
    assert "draft logits" in failed(content)


def test_measured_answers_end_where_served_chats_do(places: Places, tmp_path: Path, monkeypatch: Any) -> None:
    """With a template whose end of turn is no eos token: the tail behind it is no part of any figure."""
    template = tmp_path / "ends-with-pad.jinja"
    template.write_text(tiny.TEMPLATE.replace("<|im_end|>", "<|pad|>"))
    target = load_target(dataclasses.replace(TARGET, chat_template=str(template)), places.cache)
    end = target.tokenizer.convert_tokens_to_ids("<|pad|>")
    assert target.eos_ids and end not in target.eos_ids
    draft = small_draft(load_target(TARGET, places.cache))
    engine = Engine(target, ENGINE)
    asked: list[Request] = []
    generate = engine.generate

    def seen(requests: list[Request]) -> list[Completion]:
        asked.extend(requests)
        return generate(requests)

    monkeypatch.setattr(engine, "generate", seen)
    rows = read_rows(places.corpus, "heldout")[:2]
    short = dataclasses.replace(BENCHMARK, max_new_tokens=4)
    arms = (Arm("none", "none"), Arm("draft t1", "draft", sampled=True))
    run_arms(engine, arms, proposers(arms, {"draft": draft}, ENGINE), rows, short, ("none", "draft t1"))
    collect_rounds(engine, block_proposer(draft, ENGINE), rows, short)
    decode(engine, draft, rows, dataclasses.replace(PARITY, max_new_tokens=4), 1.0)
    assert len(asked) >= 4 + 4 + 2
    assert {r.stop_ids for r in asked} == {tuple(sorted({end, *target.eos_ids}))}


def test_a_swapped_slot_layout_is_caught(trained: Trained, monkeypatch: Any) -> None:
    """The engine reads the block as DFlash's own layout has it: slot k stands for token k, not k + 1."""
    from pipeline.drafts.dspark import DSparkDraft

    blocks = DSparkDraft.blocks

    def swapped(self: Any, tokens: Any, anchors: Any, attend: Any) -> Any:
        hidden = blocks(self, tokens, anchors, attend)
        if torch.is_inference_mode_enabled():
            hidden = hidden.unflatten(0, (-1, self.config.block_size)).roll(1, 1).flatten(0, 1)
        return hidden

    monkeypatch.setattr(DSparkDraft, "blocks", swapped)
    assert "draft logits" in failed(trained.check(draft_of(trained.places, trained.root / "draft")))


@pytest.mark.parametrize("slot", [1, 2])
def test_a_fault_of_later_slots_alone_is_caught(trained: Trained, monkeypatch: Any, slot: int) -> None:
    """The engine reads another slot's hidden state there: most slots that count are before it and right."""
    from pipeline.drafts.dspark import DSparkDraft

    blocks = DSparkDraft.blocks

    def swapped(self: Any, tokens: Any, anchors: Any, attend: Any) -> Any:
        hidden = blocks(self, tokens, anchors, attend)
        if torch.is_inference_mode_enabled():
            hidden = hidden.unflatten(0, (-1, self.config.block_size)).clone()
            hidden[:, slot] = hidden[:, 0]
            hidden = hidden.flatten(0, 1)
        return hidden

    monkeypatch.setattr(DSparkDraft, "blocks", swapped)
    content = trained.check(draft_of(trained.places, trained.root / "draft"))
    assert "draft logits" in failed(content)
    (check,) = [c for c in content["checks"] if c["name"] == "draft logits"]
    assert f"at position {slot + 1}, the furthest" in check["detail"]


def test_context_that_includes_the_anchor_is_caught(trained: Trained, monkeypatch: Any) -> None:
    """The engine keeps the taps one position late: what stands for a position is what the next one saw."""
    commit = DSparkProposer.commit

    def late(self: Any, commits: Any, taps: Any) -> None:
        commit(self, commits, None if taps is None else taps.roll(-1, 0))

    monkeypatch.setattr(DSparkProposer, "commit", late)
    assert "draft logits" in failed(trained.check(draft_of(trained.places, trained.root / "draft")))


def test_a_template_without_the_system_prompt_is_caught(trained: Trained, tmp_path: Path) -> None:
    target = load_target(TARGET, trained.places.cache)
    source = json.loads((trained.places.corpus / "manifest.json").read_text())["info"]["source"]
    settings = CorpusConfig(source=source, max_length=128, heldout_fraction=0.3)
    identity = target.identity.as_dict()
    corpus = tmp_path / "with-system"
    build_corpus(settings, target.tokenizer, identity, corpus, system_prompt="Be brief.")
    places = dataclasses.replace(trained.places, corpus=corpus)
    asked = Trained(places, store(target, places, tmp_path / "other"), tmp_path)
    draft = draft_of(places, tmp_path / "draft")
    assert failed(asked.check(draft)) == {"prompts"}
    assert failed(asked.check(draft, dataclasses.replace(TARGET, system_prompt="Be brief."))) == set()


def test_an_unnormalised_last_hidden_state_is_caught(trained: Trained, tmp_path: Path) -> None:
    target = load_target(TARGET, trained.places.cache)
    weight = 1 / target.family.final_norm.weight.detach()

    def raw(row: Any) -> Any:
        size = torch.linspace(2, 30, len(row.input_ids))[:, None]
        return dataclasses.replace(row, last_hidden=(row.last_hidden.float() * weight * size).bfloat16())

    features = store(target, trained.places, tmp_path / "raw", raw)
    content = trained.check(draft_of(trained.places, tmp_path / "draft"), features=features)
    assert failed(content) == {"features"}
    assert "last hidden" in next(c for c in content["checks"] if c["name"] == "features")["detail"]


def test_features_of_another_layer_are_caught(trained: Trained, tmp_path: Path) -> None:
    target = load_target(TARGET, trained.places.cache)
    size = target.hidden_size

    def swapped(row: Any) -> Any:
        return dataclasses.replace(row, taps=torch.cat((row.taps[:, size:], row.taps[:, :size]), 1))

    features = store(target, trained.places, tmp_path / "swapped", swapped)
    assert failed(trained.check(draft_of(trained.places, tmp_path / "draft"), features=features)) == {"features"}


def test_prompts_that_fit_are_picked_not_those_picked_that_fit(
    places: Places, tmp_path: Path, monkeypatch: Any
) -> None:
    """Corpora whose first picks are all too long have others that are not."""
    lengths = [r.prompt_length for r in read_rows(places.corpus, "heldout")]
    rows = read_rows(places.corpus, "heldout")
    first = pick_prompts(rows, 0, 1, PARITY.seed)[1][0].sample_id
    long = [dataclasses.replace(r, prompt_length=9999) if r.sample_id == first else r for r in rows]
    monkeypatch.setattr("pipeline.evaluation.parity.read_rows", lambda *_: long)
    picked: list[Any] = []

    def seen(_target: Any, _system: Any, _corpus: Any, rows: list[Any]) -> None:
        picked.extend(rows)
        raise DraftlineError("far enough")

    monkeypatch.setattr("pipeline.evaluation.parity._prompts", seen)
    one = dataclasses.replace(PARITY, prompts=1)
    with pytest.raises(DraftlineError, match="far enough"):
        check_parity(places.draft, TARGET, places.corpus, None, ENGINE, one, tmp_path / "p", places.cache)
    assert len(picked) == 1 and picked[0].prompt_length in lengths


def test_a_draft_that_failed_or_was_not_checked_is_refused_with_its_numbers(trained: Trained, monkeypatch: Any) -> None:
    draft = draft_of(trained.places, trained.root / "draft")
    digest = artifact.load(draft, "draft").digest
    with pytest.raises(ParityError, match="was of the draft"):
        trained.check(draft)
        require_parity(trained.root / "parity", "f" * 64)
    monkeypatch.setattr("pipeline.evaluation.parity.FEATURES_APART", -1.0)
    (trained.root / "parity" / "manifest.json").unlink()
    trained.check(draft)
    with pytest.raises(ParityError, match="features .* FAILED"):
        require_parity(trained.root / "parity", digest)
