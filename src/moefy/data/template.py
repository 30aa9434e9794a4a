"""Chat templates, and conversations as tokens with the loss on what the assistant says."""

from __future__ import annotations

import re
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from moefy.checkpoint.bounded import bounded
from moefy.data.conversations import Conversation, Message
from moefy.data.render import render
from moefy.errors import UsageError
from moefy.progress import Progress, ProgressFn, silent

CHATML = "chatml"
_BEGIN, _END = "<|im_start|>", "<|im_end|>"
_TEMPLATE_BYTES = 1 << 20
_PROBE: list[Message] = [
    {"role": "user", "content": "Ping?"},
    {"role": "assistant", "content": "Pong."},
    {"role": "user", "content": "Ping again?"},
    {"role": "assistant", "content": "Pong again."},
]


@dataclass(frozen=True)
class ChatTemplate:
    """How messages become text."""

    name: str  # for people
    source: str | None = None  # Jinja text, saved with the model; None: the model's own stays
    by_answer: bool = False  # every answer is trained in a text of its own

    def render(self, tokenizer: Any, messages: list[Message], *, answer: bool = False) -> str:
        """Return the text of messages; `answer` ends it with what opens the assistant's turn.

        Raises:
            ValueError: the template refuses these messages.
            UsageError: it takes too much time or memory.
        """
        return render(
            tokenizer.get_chat_template(self.source),
            messages,
            add_generation_prompt=answer,
            **tokenizer.special_tokens_map,
        )

    def prompt(self, tokenizer: Any, messages: list[Message]) -> list[int]:
        """Return the tokens of messages and of what opens the assistant's turn; as `render`."""
        text = self.render(tokenizer, messages, answer=True)
        harmless = without_control(tokenizer, messages)
        frame = self.render(tokenizer, harmless, answer=True) if harmless != messages else text
        return tokenised(tokenizer, text, frame)[0]


def chat_template(tokenizer: Any, asked: str | None = None) -> ChatTemplate:
    """Return the template to talk to a model with.

    `asked` is `chatml`, a file with a Jinja template, or None: the model's own, and where it has
    none, `chatml`.

    Raises:
        UsageError: no such file, or ChatML cannot be written with this vocabulary.
    """
    if asked == CHATML:
        return _chatml(tokenizer)
    if asked is not None:
        try:
            with Path(asked).expanduser().open("rb") as file:
                return ChatTemplate(asked, file.read(_TEMPLATE_BYTES).decode())
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"the chat template {asked} cannot be read ({error}): name a file with a Jinja "
                f"template, or {CHATML}"
            ) from error
    if tokenizer.chat_template:
        return ChatTemplate("the model's own")
    return _chatml(tokenizer)


def for_training(tokenizer: Any, template: ChatTemplate) -> ChatTemplate:
    """Return the template as it is trained in: conversation by conversation, or answer by answer.

    Some templates render earlier answers otherwise than the last one: Qwen3's drops their thoughts,
    Phi-3's ends every text. There every answer is trained as the model will be asked for it.

    Raises:
        UsageError: it cannot be told what the assistant said.
    """
    try:
        assistant_spans(tokenizer, template, _PROBE)
    except ValueError as error:
        problem = error
    else:
        return template
    by_answer = replace(template, name=f"{template.name}, by answer", by_answer=True)
    with suppress(ValueError):
        assistant_spans(tokenizer, by_answer, _PROBE)
        return by_answer
    raise UsageError(
        f"with the chat template ({template.name}) it cannot be told what the assistant said: "
        f"{problem}. Pass --chat-template with a file that writes user and assistant in turn and "
        f"whose text only grows, or --chat-template {CHATML}"
    ) from problem


Spans = list[tuple[int, int]]


def without_control(tokenizer: Any, messages: list[Message]) -> list[Message]:
    """Return messages with letters in place of the tokenizer's special tokens."""
    control = _control(tokenizer)
    hide = partial(control.sub, lambda found: "x" * len(found[0]))
    return [message | {"content": hide(message["content"])} for message in messages]


def tokenised(tokenizer: Any, text: str, frame: str) -> tuple[list[int], Spans]:
    """Return the tokens of a rendered conversation, and the characters that each stands for.

    Special tokens that stand in a message are text: only the template writes control tokens.

    `frame` is the `text` that the template writes of messages `without_control`. ValueError says
    that it cannot be told what in the text is the template's.
    """
    # Tokenised whole, as the model will see it.
    whole = _pieces(tokenizer, frame, [(0, len(frame), None)])
    if text == frame:
        return whole
    parts: list[tuple[int, int, int | None]] = []
    start = 0
    for found in _control(tokenizer).finditer(frame):
        token = tokenizer.convert_tokens_to_ids(found[0].strip())
        parts += [(start, found.start(), None), (*found.span(), token)]
        start = found.end()
    parts.append((start, len(frame), None))
    # Some tokenizers begin a piece otherwise than the middle of a text.
    if len(text) != len(frame) or _pieces(tokenizer, frame, parts)[0] != whole[0]:
        raise ValueError(
            "a message holds a special token, which cannot be told from the template's"
        )
    return _pieces(tokenizer, text, parts, split_special_tokens=True)


def _control(tokenizer: Any) -> re.Pattern[str]:
    """Return a pattern of the special tokens, with the white space that each takes in."""
    tokens = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
    patterns = (
        (r"\s*" if token.lstrip else "")
        + re.escape(token.content)
        + (r"\s*" if token.rstrip else "")
        for token in sorted(tokens, key=lambda token: -len(token.content))
    )
    return re.compile("|".join(patterns) or "(?!)")


def _pieces(
    tokenizer: Any, text: str, parts: list[tuple[int, int, int | None]], **options: Any
) -> tuple[list[int], Spans]:
    """Tokenise a text part by part; a part with an id is that token."""
    options |= {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
    ids: list[int] = []
    places: Spans = []
    for start, end, token in parts:
        if token is not None:
            ids.append(token)
            places.append((start, end))
        elif start < end:
            call = partial(tokenizer, text[start:end], **options)
            encoded = bounded(call, end - start)
            ids += encoded["input_ids"]
            places += [(start + first, start + last) for first, last in encoded["offset_mapping"]]
    return ids, places


def assistant_spans(
    tokenizer: Any,
    template: ChatTemplate,
    messages: list[Message],
    unlearned: Collection[int] = (),
) -> list[tuple[str, Spans]]:
    """Return a conversation's texts up to the assistant's last word, and where it speaks.

    Answers in `unlearned` are only read: they have no span, and none of the texts ends with one. A
    span begins behind what opens the assistant's turn and ends with what closes it, which the
    model has to learn to write; white space behind that is left out. There is one text, or with a
    template that is used by answer, one for every answer with that answer's span.

    Raises:
        ValueError: the template refuses these messages, or renders them differently when more
            follows.
    """
    # What follows the last answer cannot be learned from.
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    answers = [i for i in answers if i not in unlearned]
    texts: list[tuple[str, Spans]] = []
    whole = template.render(tokenizer, messages[: answers[-1] + 1])
    spans = []
    for i in answers:
        # Templates do not say who wrote what, but a turn is what its message adds to the text.
        before = template.render(tokenizer, messages[:i], answer=True)
        after = template.render(tokenizer, messages[: i + 1])
        whole_so_far = after if template.by_answer else whole
        if not (whole_so_far.startswith(after) and after.startswith(before)):
            raise ValueError(
                "the chat template renders the conversation differently when more follows"
            )
        spans.append((len(before), len(after.rstrip())))
        texts.append((after.rstrip(), spans[-1:]))
    return texts if template.by_answer else [(whole[: spans[-1][1]], spans)]


def end_of_turn(tokenizer: Any, template: ChatTemplate) -> int | None:
    """Return the special token that ends the assistant's turn; None if words or nothing do."""
    # What stands behind an answer: the first special token there ends the turn.
    answer = _PROBE[1]["content"]
    _, _, tail = template.render(tokenizer, _PROBE[:2]).rpartition(answer)
    call = partial(tokenizer, tail, add_special_tokens=False)
    tokens: list[int] = bounded(call, len(tail))["input_ids"]
    return next((token for token in tokens if token in tokenizer.added_tokens_decoder), None)


def _chatml(tokenizer: Any) -> ChatTemplate:
    """Return ChatML, written so that the model's vocabulary need not grow."""
    name, end = CHATML, _END
    if _END not in tokenizer.get_vocab():
        # Its marks are plain text then, and every runtime stops at the token that ends a text.
        end = tokenizer.eos_token
        if end is None:
            raise UsageError(
                f"the vocabulary has neither {_END} nor a token that ends a text, so a model tuned "
                "on ChatML would never stop: pass --chat-template with a file"
            )
        name = f"{CHATML} with {end} for {_END}, which is not in the vocabulary"
    # The template writes the beginning itself, because rendered text is tokenised without it.
    first = bounded(lambda: tokenizer("a"), 1)["input_ids"][0]
    begins = tokenizer.bos_token_id is not None and first == tokenizer.bos_token_id
    return ChatTemplate(
        name,
        ("{{ bos_token }}" if begins else "")
        + "{% for message in messages %}"
        + f"{{{{ '{_BEGIN}' + message['role'] + '\\n' + message['content'] }}}}"
        + f"{{{{ '{end}\\n' if message['role'] == 'assistant' else '{_END}\\n' }}}}"
        + "{% endfor %}"
        + f"{{% if add_generation_prompt %}}{{{{ '{_BEGIN}assistant\\n' }}}}{{% endif %}}",
    )


IGNORED = -100  # the label of a token without loss, as in transformers


@dataclass(frozen=True)
class Example:
    """The tokens of a conversation, or of its beginning up to one answer."""

    ids: list[int]
    labels: list[int]  # the same ids where the assistant speaks, elsewhere IGNORED
    is_cut: bool  # the conversation is longer


def make_examples(
    conversations: list[Conversation],
    tokenizer: Any,
    template: ChatTemplate,
    *,
    max_length: int,
    report: ProgressFn = silent,
) -> tuple[list[Example], list[str]]:
    """Return the examples of conversations, and a line about each that gives none.

    The tokenizer is a fast one, which knows the characters of its tokens; an example is cut off at
    `max_length` tokens.
    """
    examples, unusable = [], []
    for done, conversation in enumerate(conversations, start=1):
        try:
            examples += _examples(conversation, tokenizer, template, max_length)
        except ValueError as error:
            unusable.append(f"{conversation.where}: {error}")
        report(Progress("tokenise conversations", done, len(conversations)))
    return examples, unusable


def _examples(
    conversation: Conversation, tokenizer: Any, template: ChatTemplate, max_length: int
) -> list[Example]:
    found = []
    spoken = partial(assistant_spans, tokenizer, template, unlearned=conversation.unlearned)
    texts = frames = spoken(conversation.messages)
    harmless = without_control(tokenizer, conversation.messages)
    if harmless != conversation.messages:
        frames = spoken(harmless)
    for (text, spans), (frame, _) in zip(texts, frames, strict=True):
        # A token belongs to the assistant when all of its characters do: the model is never asked
        # for one that begins before the turn.
        ids, places = tokenised(tokenizer, text, frame)
        labels = [IGNORED] * len(ids)
        span_idx = 0
        for i, (start, end) in enumerate(places):
            while span_idx < len(spans) and start >= spans[span_idx][1]:
                span_idx += 1
            if span_idx < len(spans) and spans[span_idx][0] <= start and end <= spans[span_idx][1]:
                labels[i] = ids[i]
        if any(label != IGNORED for label in labels[:max_length]):
            found.append(Example(ids[:max_length], labels[:max_length], len(ids) > max_length))
    if not found:
        raise ValueError(f"the assistant says nothing within {max_length:,} tokens")
    return found
