"""Single tokens: their bytes joined are the text's, whatever the tokenizer's way to write them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pipeline.serving.pieces import TextOffsets, TokenPieces
from tests.serving.fakes import byte_tokenizer


def spaced(decoder: Any) -> PreTrainedTokenizerFast:
    """As Llama 2 and Gemma have it: U+2581 for a space, bytes as tokens where a character is none."""
    words = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "▁a", "é", "<0xZZ>"]
    core = Tokenizer(
        models.BPE({w: i for i, w in enumerate(words)}, [("▁", "a")], byte_fallback=True, unk_token="<unk>")
    )
    core.normalizer = normalizers.Replace(" ", "▁")
    core.decoder = decoder
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    return tokenizer


LLAMA = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
META = [decoders.ByteFallback(), decoders.Metaspace()]


@pytest.mark.parametrize(
    "tokenizer",
    [byte_tokenizer(), spaced(decoders.Sequence(LLAMA)), spaced(decoders.Sequence(META))],
    ids=["byte-level", "llama", "metaspace"],
)
@given(st.text("ab é€🙂", max_size=30))
def test_the_bytes_of_a_texts_tokens_are_the_texts(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    pieces, offsets = TokenPieces(tokenizer), TextOffsets()
    said = [pieces.of(i) for i in tokenizer(text)["input_ids"]]
    assert b"".join(b or b"?" for _, b in said) == text.encode()
    for shown, b in said:
        assert b is not None and "\ufffd" not in shown
        assert (shown.encode() == b) == _whole(b)
    before = b""
    for shown, b in said:
        assert b is not None
        begins = before.decode("utf-8", "ignore")
        assert offsets.of({"token": shown, "bytes": list(b)}) == len(begins)
        before += b


def _whole(b: bytes) -> bool:
    try:
        b.decode()
    except UnicodeDecodeError:
        return False
    return True


def test_a_space_before_a_word_special_tokens_and_what_looks_like_a_byte() -> None:
    tokenizer = spaced(decoders.Sequence(LLAMA))
    pieces = TokenPieces(tokenizer)
    said = {t: pieces.of(tokenizer.convert_tokens_to_ids(t)) for t in ("▁a", "<0xE2>", "<0xZZ>", "<|end|>", "é")}
    assert tokenizer.decode([tokenizer.convert_tokens_to_ids("▁a")]) == "a", "why tokens are not decoded one by one"
    assert said == {
        "▁a": (" a", b" a"),
        "<0xE2>": ("\\xe2", b"\xe2"),
        "<0xZZ>": ("<0xZZ>", b"<0xZZ>"),
        "<|end|>": ("<|end|>", b"<|end|>"),
        "é": ("é", "é".encode()),
    }
    assert TokenPieces(byte_tokenizer()).of(99_999) == ("", b""), "a padded row of an embedding"


def test_a_tokenizer_of_another_kind_says_what_decoding_says() -> None:
    core = Tokenizer(models.WordLevel({"<unk>": 0, "one": 1, "\ufffd": 2}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    pieces = TokenPieces(PreTrainedTokenizerFast(tokenizer_object=core))
    assert pieces.of(1) == ("one", b"one")
    assert pieces.of(2) == ("\ufffd", None), "nobody knows which bytes"
