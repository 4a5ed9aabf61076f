"""What the engine can't do is refused by its field, value and remedy, and leaves nothing behind."""

from __future__ import annotations

from typing import Any

import pytest

from pipeline.decoding import QueueFull, Request
from pipeline.drafts.dspark import DSparkDraft
from pipeline.errors import ConfigError, DraftlineError
from pipeline.target import Target
from tests.decoding.samples import engine_for, prompt_ids


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt_ids", []),
        ("prompt_ids", [9999]),
        ("max_new_tokens", 0),
        ("max_new_tokens", 600),
        ("temperature", -1.0),
        ("top_p", 0.0),
        ("top_k", -2),
        ("top_k", 10**19),
        ("top_k", 2.5),
        ("seed", None),
        ("seed", 1.5),
        ("max_draft", -1),
    ],
)
def test_a_bad_field_is_named_with_its_value(tiny: Target, draft: DSparkDraft, field: str, value: Any) -> None:
    engine = engine_for(tiny, draft, "none")
    with pytest.raises(DraftlineError, match=field) as refused:
        engine.submit(Request(**{"prompt_ids": [5], field: value}))
    assert str(value).strip("[]") in str(refused.value)
    assert not engine.has_work


def test_a_refused_request_leaves_none_in_the_engine(
    tiny: Target,
    draft: DSparkDraft,
    expected: list[list[int]],
) -> None:
    engine = engine_for(tiny, draft, "dspark")
    ids = prompt_ids(tiny)
    with pytest.raises(DraftlineError, match="top_p"):
        engine.generate([Request(ids[0], max_new_tokens=30), Request(ids[1], top_p=2.0)])
    assert not engine.has_work

    def interrupt(event: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate([Request(i, max_new_tokens=30) for i in ids], interrupt)
    assert not engine.has_work
    (done,) = engine.generate([Request(ids[1], max_new_tokens=30)])
    assert done.token_ids == expected[1][:30]


def test_a_draft_made_for_the_other_rule_may_not_sample(tiny: Target, draft: DSparkDraft) -> None:
    engine = engine_for(tiny, draft, "dspark", rule="coupled")
    engine.set_schedule("early_stop", rule="ratio")
    with pytest.raises(DraftlineError, match="draws its tokens for the coupled rule .* by the ratio rule"):
        engine.submit(Request([5], temperature=1.0))
    engine.submit(Request([5]))


def test_a_full_queue_and_an_inexact_schedule_are_refused(tiny: Target, draft: DSparkDraft) -> None:
    engine = engine_for(tiny, draft, "none", max_queue=1)
    engine.submit(Request([5]))
    with pytest.raises(QueueFull, match="max_queue=1"):
        engine.submit(Request([5]))
    engine = engine_for(tiny, draft, "none")
    for _ in range(2):  # an id is free again when its request has ended, whatever ended it
        engine.submit(Request([5], max_new_tokens=1, id="mine"))
        with pytest.raises(DraftlineError, match="another request with this id is not finished"):
            engine.submit(Request([5], id="mine"))
        engine.step()
    engine.submit(Request([5], id="mine"))
    engine.cancel("mine")
    engine.step()
    engine.submit(Request([5], id="mine"))
    engine = engine_for(tiny, draft, "dspark", rule="ratio")
    engine.set_schedule("global", rule="ratio")
    with pytest.raises(DraftlineError, match="early_stop"):
        engine.submit(Request([5], temperature=1.0))
    engine.submit(Request([5]))
    with pytest.raises(ConfigError, match="Did you mean 'early_stop'"):
        engine.set_schedule("earlystop")
