"""What single tokens say: their bytes, for log-probabilities. Decoding them one by one would lose spaces and bytes."""

from __future__ import annotations

import codecs
import json
import re
from typing import Any

_BROKEN = "\ufffd"
_BYTE = re.compile("<0x([0-9A-F]{2})>")


class TokenPieces:
    """Bytes and readable text of the tokens of a tokenizer.

    Args:
        tokenizer: transformers' fast one; of its decoder are known byte-level ones, those with byte fallback, and those
            that write a space as another character. Of any other a token is what decoding it alone gives.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._kept: dict[int, tuple[str, bytes | None]] = {}
        core = getattr(tokenizer, "backend_tokenizer", None)
        steps = [] if core is None else _steps(json.loads(core.to_str())["decoder"])
        kinds = {step["type"] for step in steps}
        self._bytes_of = _alphabet() if "ByteLevel" in kinds else {}
        self._falls_back = "ByteFallback" in kinds
        replaced = [s for s in steps if s["type"] == "Replace" and "String" in s["pattern"]]
        self._spaces = [(s["pattern"]["String"], s["content"]) for s in replaced]
        self._spaces += [(s["replacement"], " ") for s in steps if s["type"] == "Metaspace"]
        self._known = bool(self._bytes_of) or self._falls_back or bool(self._spaces)

    def of(self, token_id: int) -> tuple[str, bytes | None]:
        """Text and bytes of a token. Text of bytes that are no whole character has them as `\\xe2`; bytes are None
        where the tokenizer tells none."""
        if token_id not in self._kept:
            said = self._bytes(token_id)
            if said is not None:
                self._kept[token_id] = said.decode("utf-8", "backslashreplace"), said
            else:
                self._kept[token_id] = str(self._tokenizer.decode([token_id])), None
        return self._kept[token_id]

    def _bytes(self, token_id: int) -> bytes | None:
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None:  # a padded row of the embedding
            return b""
        if token_id in self._tokenizer.added_tokens_decoder:
            return str(token).encode()
        if self._bytes_of:
            return bytes(self._bytes_of[c] for c in token) if all(c in self._bytes_of for c in token) else None
        if self._falls_back and (byte := _BYTE.fullmatch(token)):
            return bytes.fromhex(byte[1])
        if self._known:
            for sign, content in self._spaces:
                token = token.replace(sign, content)
            return str(token).encode()
        text = str(self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False))
        return None if _BROKEN in text else text.encode()


class TextOffsets:
    """Where in a text, in characters, each of its tokens begins; tokens that share a character begin where it does."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at = 0

    def of(self, entry: dict[str, Any]) -> int:
        """The offset of the next token, of which `entry` has token and bytes."""
        at = self._at
        said = entry["bytes"]
        self._at += len(entry["token"]) if said is None else len(self._decoder.decode(bytes(said)))
        return at


def _steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    return [s for d in decoder["decoders"] for s in _steps(d)] if decoder["type"] == "Sequence" else [decoder]


def _alphabet() -> dict[str, int]:
    """Which byte each character of byte-level BPE's alphabet stands for: printable ones for themselves, the others for
    the characters from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}
