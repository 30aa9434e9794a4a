"""GGUF files behind llama.cpp's server, with several clients at once.

    python benchmarks/serving.py DENSE.gguf MOE.gguf [--clients 8] [--requests 2] [--rounds 3]

Every client asks for streamed chat completions through OpenAI's protocol, one behind another. The
files take turns, and a round's ratio is to the first file in the same round; the medians go into
docs/runtimes/serving.csv and docs/runtimes.md. A request that fails or is cut ends the measurement.
"""

from __future__ import annotations

import argparse
import http.client
import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from publish import publish_table

from moefy.evaluation.llama_cpp import server

DOCS = Path(__file__).parents[1] / "docs"
RESULT, PAGE = DOCS / "runtimes" / "serving.csv", DOCS / "runtimes.md"
SLOT = 512
"""Tokens of a client's prompt and answer together."""


@dataclass(frozen=True)
class Answer:
    """What one request got."""

    text: str
    tokens: int
    first_s: float  # until the first piece of text
    total_s: float


def ask(address: str, question: str, tokens: int) -> Answer:
    """Send one streamed chat request, and read its events to the end."""
    body = {
        "model": "any",
        "messages": [{"role": "user", "content": question}],
        "max_tokens": tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "temperature": 0,
    }
    started = time.perf_counter()
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=600)
    connection.request(
        "POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"}
    )
    response = connection.getresponse()
    assert response.status == 200, response.read()
    first, text, used, ended = 0.0, "", 0, False
    for line in response:
        event = line.decode().strip().removeprefix("data: ")
        ended = ended or event == "[DONE]"
        if not event.startswith("{"):
            continue
        piece = json.loads(event)
        used = (piece.get("usage") or {}).get("completion_tokens", used)
        for choice in piece.get("choices", ()):
            new = choice["delta"].get("content") or ""
            first = first or (time.perf_counter() - started if new else 0.0)
            text += new
    connection.close()
    assert ended, f"the stream was cut: {text!r}"
    assert used == tokens, f"{used} of {tokens} tokens came: {text!r}"
    return Answer(text, used, first, time.perf_counter() - started)


def load(file: Path, clients: int, requests: int, tokens: int) -> tuple[float, float]:
    """Return tokens/s of all clients together, and the median seconds to a first token."""
    questions = [
        [f"Tell me a story about the number {client * requests + i}." for i in range(requests)]
        for client in range(clients)
    ]
    slots = {"context": clients * SLOT, "parallel": clients}
    with server(file, **slots) as (address, _), ThreadPoolExecutor(clients) as threads:
        ask(address, "Hello", 1)  # loads what is loaded once
        started = time.perf_counter()

        def several(each: list[str]) -> list[Answer]:
            return [ask(address, question, tokens) for question in each]

        answers = [answer for found in threads.map(several, questions) for answer in found]
        seconds = time.perf_counter() - started
    assert len(answers) == clients * requests
    return sum(answer.tokens for answer in answers) / seconds, median(a.first_s for a in answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    for name, value in (("clients", 8), ("requests", 2), ("rounds", 3), ("tokens", 64)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    how = options.clients, options.requests, options.tokens
    rounds = [[load(file, *how) for file in options.files] for _ in range(options.rounds)]
    rows = [["file", "clients", "tokens/s", "vs. the first", "s to first token", "vs. the first"]]
    for place, file in enumerate(options.files):
        speeds, waits = zip(*(found[place] for found in rounds), strict=True)
        ratios = [
            median(found[place][kind] / found[0][kind] for found in rounds) for kind in (0, 1)
        ]
        rows.append(
            [
                file.name,
                str(options.clients),
                f"{median(speeds):.1f}",
                f"{ratios[0]:.2f}",
                f"{median(waits):.2f}",
                f"{ratios[1]:.2f}",
            ]
        )
    publish_table(rows, RESULT, PAGE)
    print("\n".join(map(", ".join, rows)))


if __name__ == "__main__":
    main()
