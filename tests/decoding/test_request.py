"""What a request may ask for: values that can't be served, or that contradict each other, are named before a step."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from draftline_kernels import COLDEST
from pipeline.config import EngineConfig
from pipeline.decoding import Engine, Request
from pipeline.decoding.request import RequestRefused
from pipeline.target import Target

VOCABULARY, CONTEXT = 50, 100


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt_ids": [3, 3.0]}, "prompt_ids is 3.0; it must be a token id"),
        ({"prompt_ids": [3, True]}, "prompt_ids is True; it must be a token id"),
        ({"prompt_ids": [3, "4"]}, "prompt_ids is '4'; it must be a token id"),
        ({"prompt_ids": [3, VOCABULARY]}, "prompt_ids is 50; it must be a token id of the target, an integer from 0"),
        ({"stop_ids": (VOCABULARY,)}, "stop_ids is 50; it must be a token id of the target, an integer from 0 to 49"),
        ({"stop_ids": (-1,)}, "stop_ids is -1"),
        ({"stop_ids": (2.0,)}, "stop_ids is 2.0"),
        ({"max_new_tokens": 8.5}, "max_new_tokens is 8.5; it must be an integer"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"max_draft": 2.5}, "max_draft is 2.5; it must be an integer"),
        ({"max_draft": True}, "max_draft is True"),
        ({"max_draft": 0, "draft": "v1"}, "max_draft is 0; it must be 1 or more, or None, where draft='v1'"),
        ({"logprobs": 2.0}, "logprobs is 2.0; it must be an integer"),
        ({"logprobs": True}, "logprobs is True"),
        ({"logit_bias": {5.0: 1.0}}, "logit_bias is 5.0; it must be of token ids"),
        ({"logit_bias": {True: 1.0}}, "logit_bias is True; it must be of token ids"),
        ({"repetition_penalty": 0.009}, "repetition_penalty is 0.009; it must be from 0.01 to 10"),
        ({"temperature": 1e-6, "top_k": 4}, "temperature is 1e-06; it must be 0 (greedy) or at least 1e-05 where"),
        ({"temperature": 1e-6, "top_p": 0.9}, "temperature is 1e-06"),
        ({"temperature": 1e-6, "min_p": 0.1}, "temperature is 1e-06"),
    ],
)  # fmt: skip
def test_a_value_that_can_t_be_served_is_named(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestRefused, match=re.escape(words)) as refused:
        Request(**{"prompt_ids": [3], "max_new_tokens": 8, **fields}).check(VOCABULARY, CONTEXT)
    assert refused.value.field in fields


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0.0, "top_k": 4, "top_p": 0.9, "min_p": 0.1},
        {"temperature": 1e-6},
        {"temperature": COLDEST, "top_k": 4},
        {"max_draft": 0},
        {"max_draft": 1, "draft": "v1"},
        {"repetition_penalty": 0.01, "logit_bias": {0: 1, VOCABULARY - 1: -1.0}, "logprobs": 0},
        {"stop_ids": (0, VOCABULARY - 1), "ignore_eos": True},
    ],
)
def test_what_means_something_is_taken(fields: dict[str, Any]) -> None:
    Request([0, VOCABULARY - 1], 8, **fields).check(VOCABULARY, CONTEXT)


def test_a_long_prompt_is_read_once() -> None:
    class Counted(list[int]):
        passes = 0

        def __iter__(self) -> Iterator[int]:
            self.passes += 1
            return super().__iter__()

    prompt = Counted([7] * 4096)
    Request(prompt, 8).check(VOCABULARY, 8192)
    assert prompt.passes == 1


def test_an_eos_token_can_t_be_ignored_and_stop_the_text(tiny: Target) -> None:
    engine = Engine(tiny, EngineConfig(max_requests=1, max_context=64, threads=1))
    eos = min(tiny.eos_ids)
    with pytest.raises(RequestRefused, match=rf"stop_ids holds {eos}, an eos token .* ignore_eos is True\. Leave one"):
        engine.submit(Request([5], 8, stop_ids=(7, eos), ignore_eos=True))
    assert not engine.has_work
    engine.submit(Request([5], 8, stop_ids=(7,), ignore_eos=True))
    engine.submit(Request([5], 8, stop_ids=(7, eos)))


@pytest.mark.parametrize("temperature", [0.0, 1e-6])
def test_several_samples_of_a_greedy_request_are_refused(temperature: float) -> None:
    request = Request([5], temperature=temperature)
    with pytest.raises(RequestRefused, match=rf"temperature is {temperature}, which gives 3 times the same text"):
        request.samples(3)
    assert len(request.samples(1)) == 1
