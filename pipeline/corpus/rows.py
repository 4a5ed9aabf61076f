"""Chat template -> token row with loss mask: the one place that says which tokens the assistant spoke.

The tokenizer's own chat template does the marking, in one of two ways:

- a template with `{% generation %}` spans marks them itself (`apply_chat_template(return_assistant_tokens_mask=True)`);
- any other is marked by prefix difference: the conversation is rendered up to an assistant turn with the generation
  prompt, and again with that turn. The first must be an exact prefix of the second and of the whole conversation, in
  text and in tokens; what follows it, up to and with the end-of-turn token, is what the assistant spoke.

A template that allows neither is refused (`TemplateError`); a row whose text breaks the property (its first
characters merge with the prompt's last token) is refused alone (`RowError`). Nothing is guessed.

Shape letters: S tokens of a row.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.corpus.conversations import Conversation, Message, place_of
from pipeline.errors import DraftlineError

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_REMEDY = (
    "Set target.chat_template=FILE to a Jinja chat template that renders each assistant turn right after its "
    "generation prompt and ends it with a special token, or that marks it with {% generation %}...{% endgeneration %}."
)
_PLACEHOLDER = "a"


class TemplateError(DraftlineError):
    """The tokenizer's chat template is missing or cannot say which tokens the assistant spoke."""


class RowError(DraftlineError):
    """One conversation cannot be turned into tokens with this template, though others can."""


class _Unmarkable(Exception):
    """A turn could not be marked; `turn` is its index among the messages. The template or the text is at fault."""

    def __init__(self, turn: int, why: str):
        super().__init__(why)
        self.turn = turn
        self.why = why


@dataclass(frozen=True)
class TokenRow:
    """One training row.

    Attributes:
        sample_id: content hash of input_ids and loss_mask, 32 hex digits.
        input_ids: int32[S].
        loss_mask: bool[S], true where the assistant speaks: its text and its end-of-turn token.
        source: where the conversation came from.
        prompt_length: tokens before the first assistant turn, its generation prompt included; at most S.
        cut: the row was longer than max_length and ends there.
    """

    sample_id: str
    input_ids: np.ndarray
    loss_mask: np.ndarray
    source: str
    prompt_length: int
    cut: bool = False


@dataclass(frozen=True)
class _Turn:
    """Token indices of one assistant turn: it speaks [start, end_of_text), the mask covers [start, end)."""

    start: int
    end_of_text: int
    end: int


def sample_id_of(input_ids: np.ndarray, loss_mask: np.ndarray) -> str:
    """First 32 hex digits of SHA-256 over input_ids (int32, little-endian) and loss_mask (one byte each)."""
    digest = hashlib.sha256(input_ids.astype("<i4").tobytes())
    digest.update(loss_mask.astype(np.uint8).tobytes())
    return digest.hexdigest()[:32]


def tokenize(conversation: Conversation, tokenizer: Any, max_length: int = 0) -> TokenRow:
    """One conversation as a token row; for many, make one `ChatFormat` and call its `row`.

    Raises:
        TemplateError, RowError: see `ChatFormat.row`.
    """
    return ChatFormat(tokenizer).row(conversation, max_length)


class ChatFormat:
    """A tokenizer with a chat template that has been shown to mark assistant turns.

    Attributes:
        tokenizer: a transformers tokenizer.
        uses_spans: the template has `{% generation %}` spans.
        end_of_turn: id of the special token that ends an assistant turn; None if the template has none.

    Raises:
        TemplateError: no template, one that fails on a plain question and answer, or one that cannot mark the answer.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        try:
            template = tokenizer.get_chat_template()
        except ValueError as e:
            raise TemplateError(f"The tokenizer has no chat template ({_first_line(e)}). {_REMEDY}") from None
        self.template_digest = hashlib.sha256(template.encode()).hexdigest()
        self.uses_spans = bool(_GENERATION.search(template))
        added = getattr(tokenizer, "added_tokens_decoder", {})
        special = {i: t.content for i, t in added.items() if t.special}
        special |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
        self._special: dict[int, str] = {i: text for i, text in special.items() if text}
        self._special_pattern = re.compile("|".join(map(re.escape, self._special.values())) or r"(?!)")
        self._shapes: dict[tuple[str, ...], _Unmarkable | None] = {}
        question = (Message("user", _PLACEHOLDER), Message("assistant", _PLACEHOLDER))
        try:
            ids, (turn,) = self._layout(question)
        except _Unmarkable as e:
            raise self._template_error(question, e) from None
        # Behind a span that no special token ends there is text (a newline), where no answer may be stopped.
        self.end_of_turn = next((i for i in ids[turn.end_of_text :][:1] if i in self._special), None)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of messages that end with a user turn, generation prompt included: what the engine is given.

        Raises:
            RowError: a message spells a special token, or the template does not take these messages.
        """
        self._refuse_special_text(messages)
        try:
            return self._encode(self._render(messages, len(messages), prompt=True))
        except _Unmarkable as e:
            raise RowError(f"The chat template does not take this prompt: {e.why}") from None

    def stop_ids(self, eos_ids: Iterable[int]) -> tuple[int, ...]:
        """Tokens that end an answer wherever one is decoded: the target's eos tokens and the template's end of turn,
        which is none of them where a base checkpoint is given a chat template."""
        own = [] if self.end_of_turn is None else [self.end_of_turn]
        return tuple(sorted({*eos_ids, *own}))

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of response tokens, special tokens left out, spaces untouched."""
        return self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def row(self, conversation: Conversation, max_length: int = 0) -> TokenRow:
        """Tokens and loss mask of a conversation, up to its last assistant turn's rendering.

        A message cut short by the target (`finish_reason` other than "stop") ends the row right after its text: no
        end-of-turn token follows it. A message with `token_ids` contributes exactly these.

        Args:
            max_length: keep this many tokens at most (`TokenRow.cut` tells); 0 keeps all.

        Raises:
            TemplateError: the template cannot mark turns of a conversation of this shape, whatever its text.
            RowError: only this text cannot be marked; it spells a special token; or its token_ids are not its text.
        """
        messages = conversation.messages
        last = max(i for i, m in enumerate(messages) if m.role == "assistant")
        messages = messages[: last + 1]
        self._refuse_special_text(messages)
        for i, message in enumerate(messages):
            self._check_token_ids(place_of(messages, i), message)
        shown = tuple(Message(m.role, _PLACEHOLDER if m.token_ids else m.content) for m in messages)
        try:
            ids, turns = self._layout(shown)
        except _Unmarkable as e:
            self._check_shape(messages)
            raise RowError(f"{place_of(messages, e.turn)}: {e.why}") from None
        answers = [m for m in messages if m.role == "assistant"]
        out: list[int] = []
        mask: list[bool] = []
        done = 0
        for turn, message in zip(turns, answers, strict=True):
            spoken = list(message.token_ids) if message.token_ids else ids[turn.start : turn.end_of_text]
            out += ids[done : turn.start] + spoken
            mask += [False] * (turn.start - done) + [True] * len(spoken)
            if not message.ended:
                done = len(ids)
                break
            out += ids[turn.end_of_text : turn.end]
            mask += [True] * (turn.end - turn.end_of_text)
            done = turn.end
        out += ids[done:]
        mask += [False] * (len(ids) - done)
        keep = max_length or len(out)
        input_ids = np.asarray(out[:keep], dtype=np.int32)
        loss_mask = np.asarray(mask[:keep], dtype=bool)
        return TokenRow(
            sample_id=sample_id_of(input_ids, loss_mask),
            input_ids=input_ids,
            loss_mask=loss_mask,
            source=conversation.source,
            prompt_length=min(turns[0].start, len(input_ids)),
            cut=len(out) > keep,
        )

    def _layout(self, messages: Sequence[Message]) -> tuple[list[int], list[_Turn]]:
        """Token ids of the whole rendering and where its assistant turns are; raises _Unmarkable."""
        turns = [i for i, m in enumerate(messages) if m.role == "assistant"]
        return self._layout_spans(messages, turns) if self.uses_spans else self._layout_prefix(messages, turns)

    def _layout_prefix(self, messages: Sequence[Message], turns: list[int]) -> tuple[list[int], list[_Turn]]:
        whole = self._render(messages, len(messages))
        ids = self._encode(whole)
        marked = []
        for i in turns:
            prompt, answered = self._render(messages, i, prompt=True), self._render(messages, i + 1)
            if not (answered.startswith(prompt) and whole.startswith(answered)):
                raise _Unmarkable(i, "the template renders what comes before this turn differently once it is there")
            start = len(prompt_ids := self._encode(prompt))
            if ids[:start] != prompt_ids:
                raise _Unmarkable(
                    i,
                    f"the first characters {messages[i].content[:8]!r} merge with the generation prompt's last token, "
                    "so a target given the prompt could not have said it in these tokens",
                )
            # Content spells no special token, so the first one in the turn is the template's own.
            end = next((j for j in range(start, len(ids)) if ids[j] in self._special), None)
            content, spoken = messages[i].content.strip(), answered[len(prompt) :].lstrip()
            if not spoken.startswith(content):
                raise _Unmarkable(
                    i, f"after the generation prompt the template puts {spoken[:40]!r}, not the assistant's text"
                )
            after = spoken[len(content) :]
            if end is None or not after.lstrip().startswith(self._special[ids[end]]):
                raise _Unmarkable(i, f"the template ends this turn with {after!r}, not with a special token")
            marked.append(_Turn(start, end, end + 1))
        return ids, marked

    def _layout_spans(self, messages: Sequence[Message], turns: list[int]) -> tuple[list[int], list[_Turn]]:
        encoded = self._apply(messages, turns[-1], tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        ids = list(encoded["input_ids"])
        mask = np.asarray(encoded["assistant_masks"], dtype=bool)
        edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0)).reshape(-1, 2).tolist()
        if len(edges) != len(turns):
            raise _Unmarkable(turns[-1], f"the template marks {len(edges)} spans for {len(turns)} assistant turns")
        marked = []
        for i, (start, end) in zip(turns, edges, strict=True):
            # transformers maps a span's characters to tokens and, where a character has none (a space that the
            # tokenizer's offsets leave out), marks up to the end of the row; so what was marked is read back.
            spoken = self.tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False)
            if not self._special_pattern.sub("", spoken).rstrip().endswith(messages[i].content.strip()):
                raise _Unmarkable(i, f"the template's span covers {spoken[:80]!r}, which is not the assistant's text")
            prompt_ids = self._encode(self._render(messages, i, prompt=True))
            if len(prompt_ids) > start or ids[: len(prompt_ids)] != prompt_ids:
                raise _Unmarkable(i, "the generation prompt's tokens are not those before the template's span")
            text_end = next((j for j in range(start, len(ids)) if ids[j] in self._special), end)
            marked.append(_Turn(start, min(text_end, end), end))
        return ids, marked

    def _render(self, messages: Sequence[Message], count: int, *, prompt: bool = False) -> str:
        text = self._apply(messages[:count], count - 1 + prompt, tokenize=False, add_generation_prompt=prompt)
        if not isinstance(text, str) or not text:
            raise _Unmarkable(count - 1 + prompt, "the template renders nothing")
        return text

    def _apply(self, messages: Sequence[Message], turn: int, **kwargs: Any) -> Any:
        plain = [{"role": m.role, "content": m.content} for m in messages]
        try:
            return self.tokenizer.apply_chat_template(plain, **kwargs)
        except Exception as e:
            raise _Unmarkable(turn, f"the template fails on it: {type(e).__name__}: {_first_line(e)}") from None

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _refuse_special_text(self, messages: Sequence[Message]) -> None:
        # All of them, not only those that forge a turn: a rendering is tokenized as one text, in which a tokenizer
        # takes every special token for one or none (split_special_tokens), the template's own included; and in pieces,
        # text gets other tokens where a tokenizer marks a text's beginning (docs/corpus.md).
        for i, message in enumerate(messages):
            if not message.token_ids and (found := self._special_pattern.search(message.content)):
                raise RowError(
                    f"{place_of(messages, i)}: the text spells the special token {found.group()!r}, which would be "
                    "read as one"
                )

    def _check_token_ids(self, place: str, message: Message) -> None:
        if not message.token_ids:
            return
        if max(message.token_ids) >= len(self.tokenizer):
            raise RowError(f"{place}: token id {max(message.token_ids)} is not in the tokenizer's vocabulary")
        if self.decode(message.token_ids) != message.content:
            raise RowError(
                f"{place}: token_ids do not spell the content: leave token_ids out if the text was edited, "
                "or regenerate with this tokenizer"
            )

    def _check_shape(self, messages: Sequence[Message]) -> None:
        """Raises TemplateError if plain text in these roles cannot be marked either: then the template is at fault."""
        shape = tuple(m.role for m in messages)
        plain = [Message(role, _PLACEHOLDER) for role in shape]
        if shape not in self._shapes:
            try:
                self._layout(plain)
                self._shapes[shape] = None
            except _Unmarkable as e:
                self._shapes[shape] = e
        if fault := self._shapes[shape]:
            raise self._template_error(messages, fault) from None

    def _template_error(self, messages: Sequence[Message], fault: _Unmarkable) -> TemplateError:
        roles = ", ".join(place_of(messages, i) if m.added else m.role for i, m in enumerate(messages))
        return TemplateError(
            f"The chat template cannot mark what the assistant speaks in {place_of(messages, fault.turn)} of a "
            f"conversation ({roles}): {fault.why}. {_REMEDY}"
        )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
