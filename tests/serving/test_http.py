"""The HTTP surface through the official client, over an engine that says what it is told to."""

from __future__ import annotations

import asyncio
import concurrent.futures
import http.client
import json
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import openai
import pytest

from pipeline.decoding.request import RequestRefused
from pipeline.serving.protocol import ChatRequest, parse
from pipeline.serving.replica import TargetReplica
from tests.serving.fakes import FakeEngine, byte_tokenizer, serving, until

ASK = {"model": "fake/target", "messages": [{"role": "user", "content": "hi"}]}


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20)


def events(url: str, path: str, body: dict) -> list[str]:
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        return [block.removeprefix("data: ") for block in answer.read().decode().split("\n\n") if block]


def test_models_are_the_target_and_its_registered_name():
    with serving(FakeEngine(), model_name="draftline-fake", draft_version="3") as (url, _):
        api = client(url)
        assert [m.id for m in api.models.list()] == ["fake/target", "draftline-fake"]
        assert api.models.retrieve("fake/target").draft_version == "3"
        answer = api.chat.completions.create(**{**ASK, "model": "draftline-fake"})
        assert answer.model == "fake/target"


def test_a_chat_answer_has_text_usage_and_what_the_draft_was_worth():
    with serving(FakeEngine("Hello, wörld!"), draft_version="3") as (url, _):
        answer = client(url).chat.completions.create(**ASK)
    assert answer.object == "chat.completion"
    assert answer.choices[0].message.content == "Hello, wörld!"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == 14
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 14
    assert answer.draftline == {
        "tau": 2.5, "target_steps": 2, "drafted": 6, "verified": 4, "accepted": 3, "draft_version": "3",
    }  # fmt: skip


@pytest.mark.parametrize("per_step", [1, 2, 5])
def test_a_stream_says_the_same_in_whole_characters_with_one_chunk_a_step(per_step):
    text = "naïve 日本 🙂 end"
    with serving(FakeEngine(text, per_step)) as (url, _):
        chunks = list(client(url).chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True}))
    parts = [c.choices[0].delta.content for c in chunks[1:] if c.choices and c.choices[0].delta.content]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(parts) == text
    assert not any("\ufffd" in p for p in parts)
    assert len(parts) <= -(-len(text.encode()) // per_step)
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 2) + ["stop"]
    assert chunks[-2].draftline["tau"] == 2.5
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(text.encode())
    assert len({c.id for c in chunks}) == 1


def test_the_stream_is_openais_to_the_letter():
    with serving(FakeEngine("Hi", 2)) as (url, _):
        got = events(url, "/v1/chat/completions", {**ASK, "stream": True})
        plain = events(url, "/v1/completions", {"model": "fake/target", "prompt": "x", "stream": True})
    assert got[-1] == plain[-1] == "[DONE]"
    first, text, last = (json.loads(e) for e in got[:-1])
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    assert text["choices"][0]["delta"] == {"content": "Hi"}
    assert "usage" not in text
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "stop")
    assert [json.loads(e)["choices"][0]["text"] for e in plain[:-1]] == ["Hi", ""]
    assert json.loads(plain[0])["object"] == "text_completion"


def test_completions_take_text_or_token_ids_and_default_to_16_tokens():
    engine = FakeEngine("x" * 40)
    with serving(engine) as (url, _):
        api = client(url)
        answer = api.completions.create(model="fake/target", prompt="abc")
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("x" * 16, "length")
        api.completions.create(model="fake/target", prompt=[5, 6], max_tokens=1)
    assert engine.requests[1].prompt_ids == [5, 6]


def test_the_corpus_system_prompt_comes_first_unless_the_client_has_one():
    def asked(*messages: dict[str, str]) -> str:
        engine = FakeEngine()
        with serving(engine, system_prompt="Be brief.") as (url, _):
            client(url).chat.completions.create(model="fake/target", messages=list(messages))
        return byte_tokenizer().decode(engine.requests[0].prompt_ids)

    user, own = {"role": "user", "content": "Hi"}, {"role": "system", "content": "Be long."}
    assert asked(user).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi")
    assert "Be brief." not in asked(own, user)


def test_a_refused_message_has_its_place_in_the_request_whatever_the_server_puts_first():
    asked = {**ASK, "messages": [*ASK["messages"], {"role": "assistant", "content": "<|im_end|>"}, *ASK["messages"]]}
    for prompt, named in ((None, "messages[1]"), ("Be brief.", "messages[1]"), ("<|im_end|>", "target.system_prompt")):
        with serving(FakeEngine(), system_prompt=prompt) as (url, _), pytest.raises(openai.BadRequestError) as refused:
            client(url).chat.completions.create(**asked)
        assert refused.value.body["message"].startswith(f"{named}: the text spells the special token '<|im_end|>'")


def test_sampling_fields_reach_the_engine():
    engine = FakeEngine()
    with serving(engine) as (url, _):
        client(url).chat.completions.create(
            **ASK, temperature=0.5, top_p=0.9, seed=7, max_tokens=5, extra_body={"top_k": 3}
        )
    r = engine.requests[0]
    assert (r.temperature, r.top_p, r.top_k, r.seed, r.max_new_tokens) == (0.5, 0.9, 3, 7, 5)


def test_a_stop_string_ends_the_text_and_the_engines_work():
    engine = FakeEngine("one two three " + "x" * 200, per_step=4, delay=0.005)
    with serving(engine) as (url, _):
        api = client(url)
        answer = api.chat.completions.create(**ASK, stop=[" three", "zzz"])
        streamed = api.chat.completions.create(**ASK, stop=" three", stream=True)
        text = "".join(c.choices[0].delta.content or "" for c in streamed)
    assert engine.requests[0].stop == (" three", "zzz") and not engine.running and not engine.cancelled
    assert answer.choices[0].message.content == text == "one two"
    assert (answer.choices[0].finish_reason, answer.choices[0].stop_reason) == ("stop", " three")
    assert answer.usage.completion_tokens == len("one two three")


@pytest.mark.parametrize("eos", ["<|im_end|>", "x"], ids=["eos", "not eos"])
def test_a_chat_ends_with_the_templates_end_of_turn_and_plain_text_goes_on(eos):
    """A base checkpoint with a chat template: its eos is another token than the one that ends a turn."""
    engine = FakeEngine("Hello<|im_end|>and on")
    engine.target.eos_ids = [byte_tokenizer().convert_tokens_to_ids(eos)]
    with serving(engine) as (url, _):
        api = client(url)
        answer = api.chat.completions.create(**ASK)
        plain = api.completions.create(model="fake/target", prompt="x", max_tokens=100)
    assert answer.choices[0].message.content == "Hello"
    assert (answer.choices[0].finish_reason, answer.choices[0].stop_reason) == ("stop", None)
    assert answer.usage.completion_tokens == len("Hello") + 1
    assert plain.choices[0].text == ("Hello" if eos == "<|im_end|>" else "Helloand on")
    assert engine.requests[1].stop_ids == ()


@pytest.mark.parametrize("stream", [False, True])
def test_several_choices_have_seeds_that_count_up(stream):
    engine = FakeEngine("Hi, 日本", per_step=2)
    with serving(engine) as (url, _):
        options = {"stream_options": {"include_usage": True}} if stream else {}
        answer = client(url).chat.completions.create(**ASK, n=3, seed=2**63 - 2, stream=stream, **options)
        if stream:
            texts, usage = ["", "", ""], None
            for chunk in answer:
                usage = chunk.usage or usage
                for choice in chunk.choices:
                    texts[choice.index] += choice.delta.content or ""
        else:
            texts, usage = [c.message.content for c in answer.choices], answer.usage
            assert [c.index for c in answer.choices] == [0, 1, 2]
            assert answer.draftline["accepted"] == 9 and answer.draftline["tau"] == 2.5
    assert texts == ["Hi, 日本"] * 3
    assert [r.seed for r in engine.requests] == [2**63 - 2, 2**63 - 1, 0]
    assert usage.completion_tokens == 3 * len("Hi, 日本".encode())


def test_choices_that_do_not_all_fit_in_the_queue_are_refused_together():
    engine = FakeEngine("x" * 200, per_step=1, delay=0.01, max_queue=2)
    with serving(engine) as (url, _):
        with pytest.raises(openai.RateLimitError):
            client(url).chat.completions.create(**ASK, n=3)
        until(lambda: not engine.running)
    assert len(engine.cancelled) == 2


def test_chats_tell_log_probabilities_of_tokens_and_of_the_likeliest_beside_them():
    with serving(FakeEngine("aé", per_step=2)) as (url, _):
        api = client(url)
        answer = api.chat.completions.create(**ASK, logprobs=True, top_logprobs=2)
        chunks = list(api.chat.completions.create(**ASK, logprobs=True, top_logprobs=2, stream=True))
        plain = api.chat.completions.create(**ASK)
    said = answer.choices[0].logprobs.content
    assert [(t.token, t.bytes, t.logprob) for t in said[:1]] == [("a", [97], -0.5)]
    assert [(t.token, t.bytes) for t in said[1:]] == [("\\xc3", [0xC3]), ("\\xa9", [0xA9])], "halves of a character"
    assert bytes(b for t in said for b in t.bytes).decode() == answer.choices[0].message.content
    assert [(t.token, t.logprob) for t in said[0].top_logprobs] == [("a", -0.5), ("b", -1.5)]
    streamed = [t for c in chunks if c.choices[0].logprobs for t in c.choices[0].logprobs.content]
    assert streamed == said
    assert plain.choices[0].logprobs is None


def test_completions_tell_log_probabilities_in_their_own_form():
    ask = {"model": "fake/target", "prompt": "x"}
    with serving(FakeEngine("aéc", per_step=2)) as (url, _):
        api = client(url)
        whole = api.completions.create(**ask, logprobs=1).choices[0].logprobs
        stream = api.completions.create(**ask, logprobs=1, stream=True)
        parts = [c.choices[0].logprobs for c in stream if c.choices[0].logprobs]
        alone = api.completions.create(**ask, logprobs=0).choices[0].logprobs
    assert (whole.tokens, whole.token_logprobs) == (["a", "\\xc3", "\\xa9", "c"], [-0.5] * 4)
    assert whole.text_offset == [0, 1, 1, 2], "where the text has them: é is one character"
    assert whole.top_logprobs == alone.top_logprobs == [{t: -0.5} for t in whole.tokens], "always with the token itself"
    assert [o for p in parts for o in p.text_offset] == whole.text_offset
    assert [t for p in parts for t in p.tokens] == whole.tokens


def test_a_request_says_how_much_is_drafted_for_it():
    engine = FakeEngine()
    with serving(engine) as (url, _):
        for said in ("off", {"max_tokens": 2}, "draft"):
            client(url).chat.completions.create(**ASK, extra_body={"speculation": said})
    assert [r.max_draft for r in engine.requests] == [0, 2, None]


def test_speculation_is_refused_where_nothing_drafts():
    engine = FakeEngine()
    engine.proposer.block_size = 0
    with serving(engine) as (url, _):
        api = client(url)
        for said in ("draft", {"max_tokens": 2}):
            with pytest.raises(openai.BadRequestError, match="but this server has no draft; leave it out") as e:
                api.chat.completions.create(**ASK, extra_body={"speculation": said})
            assert e.value.param == "speculation" and str(said) in e.value.body["message"]
        api.chat.completions.create(**ASK)
        api.chat.completions.create(**ASK, extra_body={"speculation": "off"})
    assert [r.max_draft for r in engine.requests] == [None, 0]


def test_a_replica_refuses_samples_that_would_all_be_the_same():
    """Whoever asks it without the HTTP surface, which refuses them first."""
    job = parse(ChatRequest, {**ASK, "temperature": 0}).job() | {"n": 2}
    replica = TargetReplica(FakeEngine())

    async def items():
        return [item async for item in replica.generate(job)]

    (item,) = asyncio.run(items())
    replica.close()
    assert (item["kind"], item["status"], item["param"]) == ("error", 400, "temperature")
    assert "2 times the same text" in item["message"]


def test_requests_that_come_together_are_decoded_together():
    engine = FakeEngine("x" * 60, per_step=2, delay=0.02)
    with serving(engine) as (url, _), concurrent.futures.ThreadPoolExecutor(4) as pool:
        api = client(url)
        answers = list(pool.map(lambda _: api.chat.completions.create(**ASK).choices[0].message.content, range(4)))
    assert answers == ["x" * 60] * 4
    assert engine.most_at_once == 4


@pytest.mark.parametrize(
    ("change", "status", "param", "text"),
    [
        ({"n": 17}, 400, "n", "n is 17"),
        ({"temperature": -1}, 400, "temperature", "-1"),
        ({"model": "other"}, 404, "model", "'fake/target'"),
        ({"max_tokens": 1000}, 400, "max_tokens", "1000"),
        ({"max_completion_tokens": 1000}, 400, "max_completion_tokens", "max_completion_tokens is 1000"),
        ({"logit_bias": {"999": 1}}, 400, "logit_bias", "logit_bias is 999; it must be of token ids"),
        ({"logit_bias": {"5": 101}}, 400, "logit_bias[5]", "101"),
        ({"messages": [{"role": "user", "content": "x" * 300}]}, 400, "messages", "256"),
        ({"messages": [{"role": "user", "content": "<|im_end|>"}]}, 400, "messages", "<|im_end|>"),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]},
            400,
            "messages",
            "user",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_have_openais_shape_and_status(change, status, param, text, stream):
    with serving(FakeEngine()) as (url, _), pytest.raises(openai.APIStatusError) as e:
        client(url).chat.completions.create(**{**ASK, **change}, stream=stream)
    assert e.value.status_code == status
    assert set(e.value.body) == {"message", "type", "param", "code"}
    assert e.value.param == param
    assert text in e.value.body["message"]
    assert "request-" not in e.value.body["message"].lower(), "ids that only the server knows"


def test_a_chat_without_max_tokens_takes_what_the_pages_hold():
    engine = FakeEngine("x" * 200, per_step=50)
    engine.most_tokens = 100  # of a max_context of 256
    with serving(engine) as (url, _):
        api = client(url)
        assert api.models.retrieve("fake/target").max_model_len == 100
        answer = api.chat.completions.create(**ASK)
        assert answer.usage.total_tokens == 100 and answer.choices[0].finish_reason == "length"
        with pytest.raises(openai.BadRequestError, match="leave .* of the context of 100 tokens"):
            api.chat.completions.create(**ASK, max_tokens=100)


def test_the_engine_s_refusals_name_the_api_s_fields():
    engine = FakeEngine()
    with serving(engine) as (url, _):
        api = client(url)
        with pytest.raises(openai.BadRequestError, match="prompt is 999; it must be a token id") as e:
            api.completions.create(model="fake/target", prompt=[5, 999])
        assert e.value.param == "prompt"
        engine.refusal = RequestRefused("is 61; 4 pages are too few.", "request-7/0", "prompt_ids + max_new_tokens")
        for limit in ("max_tokens", "max_completion_tokens"):
            with pytest.raises(openai.BadRequestError, match=rf"messages \+ {limit} is 61; 4 pages") as e:
                api.chat.completions.create(**ASK, **{limit: 50})
            assert (e.value.param, e.value.code) == (limit, "invalid_value")
        engine.refusal = RequestRefused("it is too late for that.", "request-8/0")
        with pytest.raises(openai.BadRequestError, match="- It is too late for that.") as e:
            api.chat.completions.create(**ASK)
        assert e.value.param is None


@pytest.mark.parametrize("stream", [False, True])
def test_usage_tells_how_much_of_the_prompt_was_cached(stream):
    engine = FakeEngine()
    engine.cached = 16
    with serving(engine) as (url, _):
        options = {"stream_options": {"include_usage": True}} if stream else {}
        answer = client(url).chat.completions.create(**ASK, n=2, stream=stream, **options)
        usage = [c.usage for c in answer][-1] if stream else answer.usage
    assert usage.prompt_tokens_details.cached_tokens == 16 < usage.prompt_tokens


@pytest.mark.parametrize(("path", "body", "status"), [("/v1/nothing", b"{}", 404), ("/v1/completions", b"{", 400)])
def test_wrong_paths_and_bodies_have_the_same_shape(path, body, status):
    with serving(FakeEngine()) as (url, _), pytest.raises(urllib.error.HTTPError) as e:
        urllib.request.urlopen(url + path, body, timeout=10)
    assert e.value.code == status
    assert "message" in json.load(e.value)["error"]


def test_text_that_is_no_text_and_nesting_without_end_are_bad_requests():
    with serving(FakeEngine()) as (url, _):
        deep = b"[" * 100_000
        half = json.dumps({**ASK, "messages": [{"role": "user", "content": "hi \ud83d"}]}).encode()
        for body, words in ((half, "half of a character"), (deep, "not JSON")):
            with pytest.raises(urllib.error.HTTPError) as e:
                urllib.request.urlopen(f"{url}/v1/chat/completions", body, timeout=10)
            assert e.value.code == 400
            assert words in json.load(e.value)["error"]["message"]


def test_a_full_queue_is_429_and_a_draining_server_503():
    engine = FakeEngine("x" * 200, per_step=1, delay=0.02, max_queue=1)
    with serving(engine) as (url, replica):
        api = client(url)
        stream = api.chat.completions.create(**ASK, stream=True)
        with pytest.raises(openai.RateLimitError) as e:
            api.chat.completions.create(**ASK)
        assert (e.value.code, e.value.response.headers["retry-after"]) == ("queue_full", "1")
        assert e.value.body["message"] == "1 requests are waiting."
        stream.close()
        until(lambda: not engine.running)
        import asyncio

        assert asyncio.run(replica.drain(5))
        with pytest.raises(openai.InternalServerError, match="draining") as e:
            api.chat.completions.create(**ASK)
        assert e.value.status_code == 503
        with pytest.raises(urllib.error.HTTPError) as health:
            urllib.request.urlopen(f"{url}/healthz", timeout=10)
        assert health.value.code == 503


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_the_engine(stream):
    engine = FakeEngine("x" * 250, per_step=1, delay=0.02)
    with serving(engine) as (url, _):
        connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)
        body = json.dumps({**ASK, "stream": stream, "max_tokens": 200})
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        until(lambda: engine.running)
        if stream:
            connection.getresponse().read(10)
        connection.close()
        until(lambda: engine.cancelled and not engine.running, 3)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_whose_text_fails_is_an_error_with_its_cause_and_the_others_go_on(stream):
    engine = FakeEngine("x" * 40, per_step=2, delay=0.01)
    with serving(engine) as (url, replica), concurrent.futures.ThreadPoolExecutor(1) as pool:
        api = client(url)
        inner, calls = replica._text, 0

        def broken(ids):
            nonlocal calls
            calls += 1
            if calls == 5:
                raise ValueError("no such byte")
            return inner(ids)

        replica._text = broken
        failing = pool.submit(lambda: list(api.chat.completions.create(**ASK, n=2, stream=stream)))
        until(lambda: engine.running)
        replica._text = inner
        good = api.chat.completions.create(**ASK)
        with pytest.raises(openai.APIError, match="This answer failed: its text failed: ValueError: no") as e:
            failing.result()
        until(lambda: not engine.running)
    assert good.choices[0].message.content == "x" * 40
    assert getattr(e.value, "status_code", 500) == 500 and e.value.code == "error"
    assert len(engine.cancelled) == 2 and len(engine.failures) == 1, "both choices end, one with the cause"


def test_an_engine_that_dies_fails_its_requests_and_its_health():
    engine = FakeEngine("x" * 250, per_step=1, delay=0.02)
    with serving(engine) as (url, replica):
        api = client(url)
        replica.check_health()
        stream = api.chat.completions.create(**ASK, stream=True)
        next(iter(stream))
        engine.fail = ValueError("weights on fire")
        with pytest.raises(openai.APIError, match="weights on fire"):
            list(stream)
        with pytest.raises(openai.InternalServerError) as e:
            api.chat.completions.create(**ASK)
        assert e.value.status_code == 503
        with pytest.raises(RuntimeError, match="weights on fire"):
            replica.check_health()
        with pytest.raises(urllib.error.HTTPError) as health:
            urllib.request.urlopen(f"{url}/healthz", timeout=10)
        assert json.load(health.value)["status"] == "dead"
