"""Streamed text: the same as decoding everything at once, whole characters only, cut at stop strings."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.decoding.text import TextStream
from tests.serving.fakes import byte_tokenizer


def decode(ids: list[int]) -> str:
    return byte_tokenizer().decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def encode(text: str) -> list[int]:
    return byte_tokenizer()(text)["input_ids"]


def pieces(ids: list[int], size: int, stop=()) -> list[str]:
    stream = TextStream(decode, stop)
    return [*(stream.push(ids[i : i + size]) for i in range(0, len(ids), size)), stream.finish()]


@given(st.text(max_size=40), st.integers(1, 7))
def test_pieces_join_to_the_text_and_none_holds_half_a_character(text, size):
    got = pieces(encode(text), size)
    assert "".join(got) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in got)


@given(st.lists(st.integers(0, 257), max_size=40), st.integers(1, 7))
def test_any_tokens_give_what_decoding_them_at_once_gives(ids, size):
    assert "".join(pieces(ids, size)) == decode(ids)


ODD = sorted({*encode("é€🙂"), *encode("a"), 256, 257})  # bytes of characters, one that is one, special tokens


@given(st.lists(st.sampled_from(ODD), max_size=120), st.integers(1, 7))
def test_bytes_that_never_become_characters_are_shown_as_they_are_at_once(ids, size):
    assert "".join(pieces(ids, size)) == decode(ids)


@pytest.mark.parametrize("ids", [encode("é")[1:] * 400, [256] * 400, encode("é") * 200, encode("a") * 400])
def test_what_a_token_costs_does_not_grow_with_the_text(ids):
    asked: list[int] = []

    def watch(some: list[int]) -> str:
        asked.append(len(some))
        return decode(some)

    stream = TextStream(watch, ["STOP"])
    shown = "".join(stream.push([i]) for i in ids) + stream.finish()
    assert shown == decode(ids)
    assert max(asked) <= 24


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=4), st.integers(1, 5))
def test_text_ends_before_the_stop_string_that_is_complete_first_however_it_is_cut_up(text, stop, size):
    complete = [text.find(s) + len(s) for s in stop if s in text]
    seen = text[: min(complete)] if complete else text
    begins = [at for at in (seen.find(s) for s in stop) if at >= 0]
    assert "".join(pieces(encode(text), size, stop)) == (text[: min(begins)] if begins else text)


@given(st.lists(st.sampled_from(ODD), max_size=60), st.lists(st.text("aé\ufffd", min_size=1, max_size=3), max_size=3))
def test_streams_over_the_same_tokens_agree_on_the_stop(ids, stop):
    """The engine's looks at every token, the server's at a step's together."""
    one, all_ = TextStream(decode, stop), TextStream(decode, stop)
    text = "".join(one.push([i]) for i in ids) + one.finish()
    assert (all_.push(ids) + all_.finish(), all_.matched) == (text, one.matched)


def test_text_is_shown_as_soon_as_it_is_certain():
    stream = TextStream(decode, ["STOP"])
    assert stream.push(encode("one S")) == "one "
    assert stream.push(encode("TO")) == ""
    assert stream.push(encode("NE")) == "STONE"
    assert stream.push(encode("é")[:1]) == ""
    assert stream.push(encode("é")[1:]) == "é"
    assert stream.push(encode("xSTOPy")) == "x"
    assert stream.stopped
    assert stream.push(encode("more")) == stream.finish() == ""


@pytest.mark.parametrize("stop", [[], ["never"]])
def test_what_was_held_back_comes_at_the_end(stop):
    stream = TextStream(decode, stop)
    shown = stream.push([*encode("ne"), encode("é")[0]])
    assert shown == ("" if stop else "ne")
    assert shown + stream.finish() == "ne\ufffd"
