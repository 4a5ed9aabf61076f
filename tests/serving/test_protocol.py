"""Requests: what is taken, what is refused, and that the refusal names field and value."""

from __future__ import annotations

import pytest

from pipeline.serving.protocol import ApiError, ChatRequest, CompletionRequest, parse

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def test_defaults_are_the_apis():
    job = parse(ChatRequest, CHAT).job()
    assert job["messages"] == [("user", "hi")]
    assert (job["temperature"], job["top_p"], job["top_k"], job["max_tokens"], job["stop"]) == (1.0, 1.0, 0, None, [])
    assert parse(CompletionRequest, {"model": "m", "prompt": "x"}).job()["max_tokens"] == 16


def test_a_request_without_a_seed_gets_another_each_time():
    assert parse(ChatRequest, CHAT).job()["seed"] != parse(ChatRequest, CHAT).job()["seed"]
    assert parse(ChatRequest, {**CHAT, "seed": 7}).job()["seed"] == 7
    assert parse(ChatRequest, {**CHAT, "seed": -1}).job()["seed"] == 2**63 - 1


def test_all_fields_arrive():
    fields = {"max_tokens": 3, "temperature": 0, "top_p": 0.5, "top_k": 4, "seed": 1, "stop": "x", "n": 1, "user": "u"}
    job = parse(ChatRequest, {**CHAT, **fields, "logprobs": None}).job()
    assert (job["max_tokens"], job["temperature"], job["top_p"], job["top_k"], job["stop"]) == (3, 0.0, 0.5, 4, ["x"])
    shaping = {"min_p": 0.1, "presence_penalty": -1, "frequency_penalty": 0.5, "repetition_penalty": 1.2}
    job = parse(ChatRequest, {**CHAT, **shaping, "logit_bias": {"12": -5}}).job()
    assert {k: job[k] for k in shaping} == shaping and job["logit_bias"] == {12: -5.0}
    plain = parse(ChatRequest, CHAT).job()
    assert (plain["min_p"], plain["repetition_penalty"], plain["logit_bias"]) == (0.0, 1.0, {})
    for given in ({"max_completion_tokens": 5}, {"max_tokens": 5, "max_completion_tokens": 5}):
        assert parse(ChatRequest, {**CHAT, **given}).job()["max_tokens"] == 5
    assert (plain["n"], plain["logprobs"], plain["max_draft"]) == (1, None, None)
    assert parse(ChatRequest, {**CHAT, "n": 3, "logprobs": True, "top_logprobs": 2}).job()["logprobs"] == 2
    assert parse(CompletionRequest, {"model": "m", "prompt": "x", "logprobs": 0}).job()["logprobs"] == 0
    for said, most in (("off", 0), ("draft", None), ({"max_tokens": 2}, 2)):
        job = parse(ChatRequest, {**CHAT, "speculation": said}).job()
        assert (job["max_draft"], job["speculation"]) == (most, said)
    assert plain["speculation"] is None
    assert parse(ChatRequest, {**CHAT, "n": 3, "temperature": 0.1}).job()["n"] == 3


def test_a_developer_speaks_as_the_system():
    messages = [{"role": "developer", "content": "Be brief."}, *CHAT["messages"]]
    assert parse(ChatRequest, {**CHAT, "messages": messages}).job()["messages"][0] == ("system", "Be brief.")


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert parse(ChatRequest, {**CHAT, "messages": [{"role": "user", "content": parts}]}).job()["messages"] == [
        ("user", "ab")
    ]


@pytest.mark.parametrize("prompt", ["x", ["x"], [1, 2]])
def test_prompts_are_a_text_or_token_ids(prompt):
    expected = "x" if prompt == ["x"] else prompt
    assert parse(CompletionRequest, {"model": "m", "prompt": prompt}).job()["prompt"] == expected


@pytest.mark.parametrize(
    ("change", "param", "value"),
    [
        ({"n": 17}, "n", "17"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream is not true"),
        ({"speculation": "on"}, "speculation", "'on'"),
        ({"speculation": {"max_tokens": 0}}, "speculation.max_tokens", "0"),
        ({"temperature": 3}, "temperature", "3"),
        ({"temperature": "hot"}, "temperature", "'hot'"),
        ({"top_p": 0}, "top_p", "0"),
        ({"top_k": -1}, "top_k", "-1"),
        ({"top_k": 10**19}, "top_k", "10000000000000000000"),
        ({"max_tokens": 0}, "max_tokens", "0"),
        ({"max_completion_tokens": 2.5}, "max_completion_tokens", "2.5"),
        ({"max_tokens": 3, "max_completion_tokens": 5}, "max_tokens", "3 and max_completion_tokens is 5"),
        ({"seed": "x"}, "seed", "'x'"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "5 strings"),
        ({"stop": [""]}, "stop", "''"),
        ({"stop": 3}, "stop", "3"),
        ({"stream": "yes"}, "stream", "'yes'"),
        ({"logprobs": 3}, "logprobs", "3"),
        ({"top_logprobs": 3}, "top_logprobs", "3, but logprobs is not true"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "21"),
        ({"presence_penalty": 2.5}, "presence_penalty", "2.5"),
        ({"repetition_penalty": 0}, "repetition_penalty", "0"),
        ({"repetition_penalty": 0.009}, "repetition_penalty", "0.009"),
        ({"n": 3, "temperature": 0}, "n", "n is 3 and temperature is 0, which gives the same text each time"),
        ({"n": 2, "temperature": 1e-6}, "n", "temperature is 1e-06"),
        ({"logit_bias": {"5": 1, "05": -100}}, "logit_bias", "'5' and '05', which are the same token"),
        ({"min_p": 1.5}, "min_p", "1.5"),
        ({"logit_bias": {"the": 1}}, "logit_bias", "'the'"),
        ({"tools": [{"type": "function"}]}, "tools", "function"),
        ({"response_format": {"type": "json_object"}}, "response_format", "json_object"),
        ({"messages": []}, "messages", "[]"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "'robot'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "image_url"),
        ({"temprature": 1}, "temprature", "Did you mean 'temperature'"),
    ],
)
def test_a_bad_field_is_named_with_its_value(change, param, value):
    with pytest.raises(ApiError) as e:
        parse(ChatRequest, {**CHAT, **change})
    assert e.value.status == 400
    assert e.value.body()["error"]["type"] == "invalid_request_error"
    assert e.value.param is not None
    assert e.value.param.startswith(param)
    assert value in e.value.message


def test_a_missing_field_and_a_body_that_is_no_object_are_named():
    with pytest.raises(ApiError, match="messages is missing"):
        parse(ChatRequest, {"model": "m"})
    with pytest.raises(ApiError, match="JSON object"):
        parse(ChatRequest, [1])
    with pytest.raises(ApiError, match="2 texts"):
        parse(CompletionRequest, {"model": "m", "prompt": ["a", "b"]})
