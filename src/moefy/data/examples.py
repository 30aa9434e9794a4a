"""Conversations as tokens, with the loss on what the assistant says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moefy.data.conversations import Conversation
from moefy.data.template import ChatTemplate, assistant_spans
from moefy.progress import Progress, ProgressFn, silent

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
    """Tokenise conversations; what cannot be used is named.

    Args:
        conversations: whole ones.
        tokenizer: a fast one, which knows the characters of its tokens.
        template: renders them.
        max_length: tokens of the longest example; what is beyond is cut off.
        report: told about progress.

    Returns:
        The examples, and a line about each conversation that gives none.
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
    for text, spans in assistant_spans(tokenizer, template, conversation.messages):
        tokenised = tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        # Tokenised whole, as the model will see it. A token belongs to the assistant when all of
        # its characters do: the model is never asked for one that begins before the turn.
        ids: list[int] = tokenised["input_ids"]
        labels = [IGNORED] * len(ids)
        span_idx = 0
        for i, (start, end) in enumerate(tokenised["offset_mapping"]):
            while span_idx < len(spans) and start >= spans[span_idx][1]:
                span_idx += 1
            if span_idx < len(spans) and spans[span_idx][0] <= start and end <= spans[span_idx][1]:
                labels[i] = ids[i]
        if any(label != IGNORED for label in labels[:max_length]):
            found.append(Example(ids[:max_length], labels[:max_length], len(ids) > max_length))
    if not found:
        raise ValueError(f"the assistant says nothing within {max_length:,} tokens")
    return found
