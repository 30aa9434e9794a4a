"""Chat templates: the model's own, or a named default; and what of a conversation is whose."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moefy.data.conversations import Message
from moefy.errors import UsageError

CHATML = "chatml"
_BEGIN, _END = "<|im_start|>", "<|im_end|>"
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
    training: str | None = None  # Jinja text for training, where that differs

    def render(self, tokenizer: Any, messages: list[Message], *, answer: bool = False) -> str:
        """Return the text of messages.

        `answer` ends it with what opens the assistant's turn.

        Raises:
            ValueError: the template refuses these messages.
        """
        from jinja2 import TemplateError

        try:
            text: str = tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=answer,
                chat_template=self.training or self.source,
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses the conversation: {error}") from error
        return text


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
            return ChatTemplate(asked, Path(asked).expanduser().read_text())
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"the chat template {asked} cannot be read ({error}): name a file with a Jinja "
                f"template, or {CHATML}"
            ) from error
    if tokenizer.chat_template:
        return ChatTemplate("the model's own")
    return _chatml(tokenizer)


def for_training(tokenizer: Any, template: ChatTemplate) -> ChatTemplate:
    """Return a template that renders a beginning of a conversation as the beginning of its text.

    Some do not: Qwen3's drops the thoughts of all answers but the last, Phi-3's ends every text.
    TRL knows a form for training of the common ones.

    Raises:
        UsageError: it does not, and TRL knows no other form of it.
    """
    try:
        assistant_spans(tokenizer, template, _PROBE)
    except ValueError as error:
        problem = error
    else:
        return template
    from trl.chat_template_utils import get_training_chat_template

    with suppress(ValueError):  # TRL knows no other form, or its form does the same
        known = None if template.source else get_training_chat_template(tokenizer)
        if known:
            changed = ChatTemplate(f"{template.name} in TRL's form for training", None, known)
            assistant_spans(tokenizer, changed, _PROBE)
            return changed
    raise UsageError(
        f"with the chat template ({template.name}) it cannot be told what the assistant said: "
        f"{problem}. Pass --chat-template with a file that writes user and assistant in turn and "
        f"whose text only grows, or --chat-template {CHATML}"
    ) from problem


def assistant_spans(
    tokenizer: Any, template: ChatTemplate, messages: list[Message]
) -> tuple[str, list[tuple[int, int]]]:
    """Return a conversation's text up to the assistant's last word, and where it speaks.

    A span begins behind what opens the assistant's turn and ends with what closes it, which the
    model has to learn to write; white space behind that is left out.

    Raises:
        ValueError: the template refuses these messages, or renders them differently when more
            follows.
    """
    # What follows the last answer cannot be learned from.
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    whole = template.render(tokenizer, messages[: last + 1])
    spans = []
    for i, message in enumerate(messages[: last + 1]):
        if message["role"] != "assistant":
            continue
        # Templates do not say who wrote what, but a turn is what its message adds to the text.
        before = template.render(tokenizer, messages[:i], answer=True)
        after = template.render(tokenizer, messages[: i + 1])
        if not (whole.startswith(after) and after.startswith(before)):
            raise ValueError(
                "the chat template renders the conversation differently when more follows"
            )
        spans.append((len(before), len(after.rstrip())))
    return whole[: spans[-1][1]], spans


def end_of_turn(tokenizer: Any, template: ChatTemplate) -> int | None:
    """Return the special token that ends the assistant's turn; None if words or nothing do.

    Raises:
        ValueError: the template refuses a conversation that begins with the user.
    """
    # What stands behind an answer: the first special token there ends the turn.
    answer = _PROBE[1]["content"]
    _, _, tail = template.render(tokenizer, _PROBE[:2]).rpartition(answer)
    tokens: list[int] = tokenizer(tail, add_special_tokens=False)["input_ids"]
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
    first = tokenizer("a")["input_ids"][0]
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
