"""A text ends with the token that completes a stop string, wherever in a block; a failing request ends alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.config import EngineConfig, TargetConfig
from pipeline.decoding import Engine, Request
from pipeline.decoding.text import TextStream
from pipeline.errors import DraftlineError
from pipeline.target import Target, load_target
from tests.decoding.samples import PROMPTS, prompt_ids, proposer_for

LONG = 60
NAMES = ["none", "ngram", "dspark", "dflash", "eagle3"]


def engine_of(target: Target, name: str) -> Engine:
    config = EngineConfig(max_requests=3, max_context=512, threads=1, scheduler="fixed")
    return Engine(target, config, proposer_for(target, name))


@pytest.fixture(scope="module")
def texts(cache_dir: Path) -> list[list[int]]:
    """Plain greedy tokens of every prompt, without stops, by transformers."""
    target = load_target(TargetConfig(path="tiny"), cache_dir)
    out = []
    for ids in prompt_ids(target):
        with torch.inference_mode():
            text = target.model.generate(torch.tensor([ids]), max_new_tokens=LONG, do_sample=False)
        out.append(text[0, len(ids) :].tolist())
    return out


def stops_in(target: Target, tokens: list[int]) -> tuple[str, int]:
    """Readable characters of two tokens late in a text (most of a random target are none), and how many tokens it
    takes until they are there."""
    pairs = [target.text(tokens[i : i + 2]) for i in range(len(tokens) - 2, 0, -1)]
    stop = next(p for p in pairs if len(p) > 1 and p.isascii())
    ends = next(n for n in range(1, len(tokens) + 1) if stop in target.text(tokens[:n]))
    return stop, ends


@pytest.mark.parametrize("name", NAMES)
def test_a_stop_string_ends_the_text_at_its_last_token(tiny: Target, texts: list[list[int]], name: str) -> None:
    found = [stops_in(tiny, text) for text in texts]
    prompts = prompt_ids(tiny)
    requests = [Request(p, LONG, stop=("never there", stop)) for p, (stop, _) in zip(prompts, found, strict=True)]
    done = engine_of(tiny, name).generate(requests)
    for completion, text, (stop, ends) in zip(done, texts, found, strict=True):
        assert completion.token_ids == text[:ends]
        assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
        assert completion.metrics.decoded == ends - 1, "what lies behind the stop counts nowhere"
        assert completion.metrics.accepted <= completion.metrics.decoded


@pytest.mark.parametrize("name", NAMES[1:])
def test_sampled_text_stops_where_plain_decodings_does(tiny: Target, name: str) -> None:
    asked = [Request(p, LONG, 0.9, seed=i, stop=("e", "a", "th")) for i, p in enumerate(prompt_ids(tiny))]
    plain = engine_of(tiny, "none").generate(asked)
    done = engine_of(tiny, name).generate(asked)
    assert [(d.token_ids, d.stop_reason) for d in done] == [(p.token_ids, p.stop_reason) for p in plain]
    assert sum(p.stop_reason is not None for p in plain) > len(plain) // 2


def test_a_stop_string_in_the_last_token_is_a_stop_and_no_length(tiny: Target, texts: list[list[int]]) -> None:
    stop, ends = stops_in(tiny, texts[0])
    (done,) = engine_of(tiny, "ngram").generate([Request(prompt_ids(tiny)[0], ends, stop=(stop,))])
    assert (done.token_ids, done.finish_reason) == (texts[0][:ends], "stop")


def test_a_stop_string_that_waits_for_the_rest_of_a_character_is_found_where_a_stop_token_comes_first(
    tiny: Target,
    texts: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else the server would cut the text there and the completion not say why."""
    token = texts[0][9]
    ends = texts[0].index(token)

    def text(ids: list[int]) -> str:
        return "STOP\ufffd" if ids else ""

    monkeypatch.setattr(tiny, "text", text)
    request = Request(prompt_ids(tiny)[0], LONG, stop_ids=(token,), stop=("STOP",))
    (done,) = engine_of(tiny, "none").generate([request])
    assert (len(done.token_ids), done.finish_reason, done.stop_reason) == (ends + 1, "stop", "STOP")


def test_which_stop_token_ended_a_text_is_told(tiny: Target, texts: list[list[int]]) -> None:
    token = texts[0][9]
    (done,) = engine_of(tiny, "none").generate([Request(prompt_ids(tiny)[0], LONG, stop_ids=(token,))])
    assert done.token_ids == texts[0][: texts[0].index(token) + 1]
    assert (done.finish_reason, done.stop_reason) == ("stop", token)


def test_an_empty_stop_string_is_refused(tiny: Target) -> None:
    with pytest.raises(DraftlineError, match="stop is .* not empty"):
        engine_of(tiny, "none").submit(Request([1], 4, stop=("",)))


@pytest.mark.parametrize("name", ["none", "dspark"])
def test_a_request_whose_text_fails_ends_alone(
    tiny: Target,
    texts: list[list[int]],
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = engine_of(tiny, name)
    requests = [Request(p, LONG, id=f"r{i}") for i, p in enumerate(prompt_ids(tiny))]
    requests[1].stop = ("x y z",)
    pushed = 0

    def push(self: TextStream, tokens: list[int]) -> str:
        nonlocal pushed
        pushed += len(tokens)
        if pushed == 5:
            raise ValueError("no such byte")
        return ""

    monkeypatch.setattr(TextStream, "push", push)
    done = engine.generate(requests)
    assert done[1].finish_reason == "error"
    assert "ValueError after 5 tokens: no such byte" in str(done[1].error)
    assert [d.token_ids for i, d in enumerate(done) if i != 1] == [t for i, t in enumerate(texts) if i != 1]
    assert len(PROMPTS) == len(done) and not engine.has_work
    again = engine.generate([Request(prompt_ids(tiny)[1], LONG)])
    assert again[0].token_ids == texts[1], "its slot serves the next request"


def test_a_request_that_its_owner_gives_up_for_a_fault_is_an_error_with_that_cause(
    tiny: Target,
    texts: list[list[int]],
) -> None:
    engine = engine_of(tiny, "dspark")
    requests = [Request(p, LONG) for p in prompt_ids(tiny)]
    for r in requests:
        engine.submit(r)
    engine.step()
    assert engine.cancel(requests[0].id, "its listener failed: OSError: gone")
    assert engine.cancel(requests[1].id)
    done = {}
    while engine.has_work:
        done |= {e.request_id: e.finished for e in engine.step() if e.finished}
    assert done[requests[0].id].finish_reason == "error"
    assert done[requests[0].id].error == "its listener failed: OSError: gone"
    assert (done[requests[1].id].finish_reason, done[requests[1].id].error) == ("cancelled", None)
    assert [done[r.id].token_ids for r in requests[2:]] == texts[2:]
