"""A conversation with a model: its answers, word by word."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import torch
from transformers import TextStreamer

from moefy.checkpoint.load import load_model, load_tokenizer
from moefy.checkpoint.reader import read_config
from moefy.checkpoint.source import resolve
from moefy.data.conversations import Message
from moefy.data.template import chat_template, end_of_turn
from moefy.errors import UsageError
from moefy.hardware import device
from moefy.progress import ProgressFn, silent

# What `generate` is told for the likeliest token, whatever the model's generation_config.json says.
_GREEDY = {
    **{"do_sample": False, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0},
    **dict.fromkeys(("temperature", "top_p", "top_k")),
}


class Speaker:
    """A model, loaded to answer; `model` is a folder, or any source `convert` takes.

    Raises:
        UsageError: the model cannot be read, or has no way to write a conversation.
    """

    def __init__(self, model: str | Path, *, report: ProgressFn = silent) -> None:
        self.folder = resolve(model, report=report)
        self._tokenizer = load_tokenizer(self.folder)
        self.template = chat_template(self._tokenizer)  # what the conversation is written in
        config = read_config(self.folder)
        dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32"))
        self._model = load_model(self.folder, dtype=dtype).to(device())
        # Either may stop an answer: base models know the end of a text, templates that of a turn.
        known = self._model.generation_config.eos_token_id
        stops = known if isinstance(known, list) else [known]
        with suppress(ValueError):  # a template may refuse a conversation without a system message
            stops = [*stops, end_of_turn(self._tokenizer, self.template)]
        self.stops = sorted({stop for stop in stops if stop is not None})

    def answer(
        self,
        messages: list[Message],
        *,
        max_new_tokens: int = 512,
        temperature: float | None = None,
        write: Callable[[str], None] | None = None,
    ) -> str:
        """Return what the model says next.

        Args:
            messages: of the conversation so far; the last is the user's.
            max_new_tokens: the longest answer.
            temperature: of sampling; 0 takes the likeliest token, whatever penalties the model's
                generation_config.json has; None leaves all to that file (and without one is 0).
            write: given the text as it comes.

        Raises:
            UsageError: the conversation is too long, or the template refuses it.
        """
        try:
            ids = self.template.prompt(self._tokenizer, messages)
        except ValueError as error:
            raise UsageError(f"{self.folder}: {error}") from error
        prompt = torch.tensor([ids], device=self._model.device)  # [1, tokens]
        room: int = self._model.config.max_position_embeddings
        if prompt.shape[1] >= room:
            raise UsageError(
                f"the conversation has {prompt.shape[1]:,} tokens and the model reads {room:,}: "
                "begin a new one"
            )
        streamer = None
        if write is not None:
            streamer = TextStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)
            streamer.on_finalized_text = lambda text, stream_end=False: write(text)
        sampling = _GREEDY if temperature == 0 else {"do_sample": True, "temperature": temperature}
        written = self._model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=min(max_new_tokens, room - prompt.shape[1]),
            eos_token_id=self.stops or None,
            pad_token_id=self.stops[0] if self.stops else 0,
            streamer=streamer,
            **({} if temperature is None else sampling),
        )
        return str(self._tokenizer.decode(written[0, prompt.shape[1] :], skip_special_tokens=True))


def chat(
    model: str | Path | Speaker,
    lines: Iterable[str],
    write: Callable[[str], None],
    *,
    system: str | None = None,
    max_new_tokens: int = 512,
    temperature: float | None = None,
    report: ProgressFn = silent,
) -> list[Message]:
    """Hold a conversation and return it: each line is a message, answers are written as they come.

    A KeyboardInterrupt during an answer ends that answer and not the conversation.

    Args:
        model: a folder, any source `convert` takes, or one loaded before.
        lines: what the user says; empty ones are passed over.
        write: given the answers' text, and a line end after each.
        system: what the model is told first.
        max_new_tokens: the longest answer.
        temperature: of sampling; see `Speaker.answer`.
        report: told about downloads.

    Raises:
        UsageError: see `Speaker`.
    """
    speaker = model if isinstance(model, Speaker) else Speaker(model, report=report)
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    for line in filter(None, map(str.strip, lines)):
        messages.append({"role": "user", "content": line})
        said: list[str] = []

        def hear(text: str, said: list[str] = said) -> None:
            said.append(text)
            write(text)

        try:
            answer = speaker.answer(
                messages, max_new_tokens=max_new_tokens, temperature=temperature, write=hear
            )
        except KeyboardInterrupt:  # what was said so far is part of the conversation
            answer = "".join(said)
        write("\n")
        messages.append({"role": "assistant", "content": answer})
    return messages
