"""Every family decodes to transformers' own greedy text, past its windows, whatever drafts; the others are refused."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch

from pipeline.config import EngineConfig
from pipeline.decoding import Engine, Request, StepCost, make_proposer
from pipeline.decoding.attention import NAME
from pipeline.decoding.geometry import LayerAttention, attention_geometry
from pipeline.drafts.dspark import DSparkDraft
from pipeline.errors import DraftlineError
from pipeline.target import Target, features_of
from tests.drafts.samples import small_draft
from tests.target.tiny_families import BUILDERS, ENGINE, VOCABULARY, WINDOW, tiny_target

NEW = 48


@functools.cache
def prompts() -> list[list[int]]:
    """Shorter than the window, far longer, and one that repeats itself for the n-gram proposer."""
    generator = torch.Generator().manual_seed(2)
    random = [torch.randint(3, 90, (n,), generator=generator).tolist() for n in (4, 41, 13)]
    return [*random, [5, 9, 23, 44] * 5]


@functools.cache
def expected(name: str) -> list[list[int]]:
    """transformers' own greedy text, never ended by a stop token."""
    target = tiny_target(name)
    texts = []
    for ids in prompts():
        with torch.inference_mode():
            out = target.model.generate(
                torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, eos_token_id=VOCABULARY
            )
        texts.append(out[0, len(ids) :].tolist())
    assert sum(len(set(t)) for t in texts) > 40, "a target that repeats itself proves nothing"
    return texts


def engine_for(target: Target, draft: DSparkDraft | None, name: str, **settings: Any) -> Engine:
    config = EngineConfig(**{"max_requests": 3, "max_context": 128, "threads": 1, "prefill_chunk": 6, **settings})
    engine = Engine(target, config, step_cost=StepCost([1, 8, 32], [0], [[1.0], [1.2], [2.0]]))
    if name != "none":
        engine.set_proposer(make_proposer(name, draft))
    return engine


@pytest.mark.parametrize("proposer", ["none", "ngram", "dspark"])
@pytest.mark.parametrize("name", ENGINE)
def test_greedy_text_past_the_window_is_generates(name: str, proposer: str) -> None:
    target = tiny_target(name)
    engine = engine_for(target, small_draft(target), proposer)
    engine.set_schedule("fixed")
    done = engine.generate([Request(ids, max_new_tokens=NEW, ignore_eos=True) for ids in prompts()])
    assert [d.token_ids for d in done] == expected(name)
    if proposer != "none":
        assert sum(d.metrics.drafted for d in done) > 0


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("mistral, sliding", {"window": 0}),
        ("gemma4", {"window": WINDOW + 1}),
        ("gemma2, both softcaps", {"softcap": 0.0}),
        ("gemma3", {"scale": 8**-0.5}),
        ("gemma4, shared keys", {"source": 0}),
    ],
)
def test_a_wrong_window_scale_softcap_or_source_gives_another_text(name: str, wrong: dict[str, Any]) -> None:
    """What the test above rests on: these targets tell such mistakes apart."""
    engine = engine_for(tiny_target(name), None, "none")
    geometry = engine.runner.geometry
    for i, layer in enumerate(geometry):
        changed = layer.window if "window" in wrong else layer.source == 1 if "source" in wrong else True
        if changed:
            geometry[i] = dataclasses.replace(layer, **wrong)
    done = engine.generate([Request(ids, max_new_tokens=NEW, ignore_eos=True) for ids in prompts()])
    assert [d.token_ids for d in done] != expected(name)


@pytest.mark.parametrize("name", ENGINE)
def test_a_step_s_taps_and_logits_are_the_plain_forward_s(name: str) -> None:
    """The draft's context while decoding is what extraction would store: chunked, batched, beyond the window."""
    ids = prompts()[1]
    target = tiny_target(name)
    (wanted,), _ = features_of(target, [0, 2], torch.tensor([ids]), [len(ids)])
    with torch.inference_mode():
        logits = target.model(torch.tensor([ids])).logits[0]
    engine = engine_for(target, None, "none")
    engine.runner.layer_ids = [0, 2]
    seen: list[torch.Tensor] = []

    def mine() -> list[int] | None:
        return next((s.pages for s in engine.batch.running if s.request.prompt_ids == ids), None)

    inner = engine.runner.step

    def watch(segments: Any, tokens: Any, rows: Any) -> Any:
        taps, out = inner(segments, tokens, rows)
        at = 0
        for s in segments:
            if s.pages is mine():
                seen.append(taps[at : at + s.count])
            at += s.count
        if segments[-1].pages is mine() and segments[-1].start + segments[-1].count == len(ids):
            torch.testing.assert_close(out[-1], logits[-1], atol=1e-4, rtol=1e-3)
        return taps, out

    engine.runner.step = watch  # type: ignore[method-assign]
    engine.generate([Request(prompts()[0], max_new_tokens=20, ignore_eos=True), Request(ids, max_new_tokens=1)])
    torch.testing.assert_close(torch.cat(seen), wanted, atol=1e-4, rtol=1e-3)


def test_the_geometry_is_each_layer_s_own() -> None:
    layers = attention_geometry(tiny_target("gemma4, shared keys"), NAME)
    near = LayerAttention(4, 2, 8, 8, 1.0, WINDOW, 0.0, 0)
    far = LayerAttention(4, 2, 16, 16, 1.0, 0, 0.0, 2)
    assert [(g.window, g.key_dim, g.source) for g in layers] == [
        (WINDOW, 8, 0),
        (WINDOW, 8, 1),
        (0, 16, 2),
        (WINDOW, 8, 1),  # keeps no keys: reads the last layer of its kind before the sharing starts
        (WINDOW, 8, 1),
        (0, 16, 2),
    ]
    assert (layers[0], layers[2]) == (near, far)
    capped = attention_geometry(tiny_target("gemma2, both softcaps"), NAME)
    assert {(g.scale, g.softcap) for g in capped} == {(5**-0.5, 0.7)}
    values = attention_geometry(tiny_target("gemma4, keys are values"), NAME)
    assert [g.groups for g in values] == [2, 2, 4]


def test_layers_that_share_keys_take_no_memory_for_them() -> None:
    engine = engine_for(tiny_target("gemma4, shared keys"), None, "none")
    assert sorted(engine.runner.cache.k) == [0, 1, 2]


def test_deepseek_v4_is_refused_by_the_engine_but_still_gives_features() -> None:
    target = tiny_target("deepseek_v4")
    ids = torch.tensor([prompts()[1]])
    before = features_of(target, [1], ids, [41])
    with pytest.raises(DraftlineError, match=r"can't run this target \(deepseek_v4\).*compressed entries.*rejected"):
        engine_for(target, None, "none")
    after = features_of(target, [1], ids, [41])
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def _unlisted(name: str) -> Target:
    target = tiny_target(name)
    # As a family without a reason of its own would be seen: by what its layers do.
    family = target.family
    target.__dict__["family"] = type(family)(
        family.name, family.backbone, family.embed_tokens, family.layers, family.final_norm, family.lm_head
    )
    return target


def _break(target: Target, how: str) -> None:
    attention: Any = target.family.layers[1].self_attn
    if how == "sinks":
        inner = attention.forward
        attention.forward = lambda *a, **k: inner(*a, **k, s_aux=torch.zeros(4))
    elif how == "not causal":
        attention.is_causal = False
    elif how == "own attention":
        attention.forward = lambda hidden_states, **_: (hidden_states, None)
    elif how == "rope":
        target.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("sinks", "layer 1's attention takes s_aux"),
        ("not causal", "layer 1 attends in both directions"),
        ("own attention", r"layer 1 \(LlamaDecoderLayer\) does not attend through AttentionInterface"),
        ("rope", r"rotary embedding \(dynamic\) follows the longest sequence"),
    ],
)
def test_a_target_the_engine_would_get_wrong_is_refused_and_left_as_it_was(how: str, says: str) -> None:
    target = tiny_target("llama")
    before = target.model.config._attn_implementation
    _break(target, how)
    with pytest.raises(DraftlineError, match=says):
        engine_for(target, None, "none")
    assert target.model.config._attn_implementation == before
    assert type(target.model.lm_head) is torch.nn.Linear


def test_a_stateful_target_is_refused_without_a_rule_of_its_own() -> None:
    with pytest.raises(DraftlineError, match="keep a running state"):
        engine_for(_unlisted("deepseek_v4"), None, "none")


def test_every_family_of_the_adapters_is_decoded_or_refused_here() -> None:
    from pipeline.target.families import ADAPTERS

    seen = {tiny_target(name).family.name for name in BUILDERS}
    # The multimodal class around the text model that is decoded here.
    assert set(ADAPTERS) - {"gemma4_unified"} == seen
