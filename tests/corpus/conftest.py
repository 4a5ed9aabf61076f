"""The trained tokenizer, and with it a chat format marked in both ways."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from tests.corpus.chats import CHATML, CHATML_SPANS, trained_bpe, with_template


@pytest.fixture(scope="session")
def bpe() -> Tokenizer:
    return trained_bpe()


@pytest.fixture(params=["prefix", "spans"])
def tokenizer(request: pytest.FixtureRequest, bpe: Tokenizer) -> PreTrainedTokenizerFast:
    """The same tokenizer and the same chat format, marked in both ways."""
    return with_template(bpe, CHATML if request.param == "prefix" else CHATML_SPANS)


@pytest.fixture
def chatml(bpe: Tokenizer) -> PreTrainedTokenizerFast:
    return with_template(bpe, CHATML)
