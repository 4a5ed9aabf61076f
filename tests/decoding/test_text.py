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


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=4), st.integers(1, 5))
def test_text_ends_before_the_first_stop_string_however_it_is_cut_up(text, stop, size):
    ends = [at for at in (text.find(s) for s in stop) if at >= 0]
    expected = text[: min(ends)] if ends else text
    got = "".join(pieces(encode(text), size, stop))
    # Two stop strings that overlap can be seen in either order; the text never passes the first that is complete.
    complete = [text.find(s) + len(s) for s in stop if s in text]
    assert text.startswith(got)
    assert got.startswith(expected)
    assert len(got) <= (min(complete) if complete else len(text))
    if len(stop) <= 1:
        assert got == expected


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
    assert stream.push([*encode("ne"), encode("é")[0]]) == ""
    assert stream.finish() == "ne\ufffd"
