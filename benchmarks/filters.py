"""What Gopher's rules keep of each domain, by what counts as a word: docs/data.md.

    pip install spacy    # only this comparison needs it
    python benchmarks/filters.py DATA    # DATA: folder of <domain>.jsonl(.gz) files

The first million characters of each domain, seconds of processor time. Writes
docs/experiments/filters.csv and the table in docs/data.md.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
from publish import publish_table

from moefy.checkpoint.load import load_tokenizer
from moefy.checkpoint.source import builtin
from moefy.data.domains import open_domains
from moefy.data.quality import gopher

RESULT = Path(__file__).parents[1] / "docs" / "experiments" / "filters.csv"
CHARACTERS = 1_000_000


def spacy_words() -> Callable[[str], str | None]:
    rules = [GopherQualityFilter(), GopherRepetitionFilter()]

    def broken_rule(text: str) -> str | None:
        kept = all(rule.filter(Document(text=text, id="")) is True for rule in rules)
        return None if kept else "dropped"

    return broken_rule


def main(data: str) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = load_tokenizer(builtin()).backend_tokenizer
    rows = [["domain", "documents", "kept", "MB/s", "kept, spaCy's words", "MB/s, spaCy's words"]]
    rows[0].append("tokenizer, MB/s")
    for domain in open_domains(data):
        documents: list[str] = []
        for text in domain.documents():
            if sum(map(len, documents)) + len(text) <= CHARACTERS:
                documents.append(text)
        size = sum(map(len, documents)) / 1e6
        row = [domain.name, str(len(documents))]
        for broken_rule in (gopher(), spacy_words()):
            broken_rule(documents[0])
            started = time.process_time()
            kept = sum(broken_rule(text) is None for text in documents)
            elapsed_s = time.process_time() - started
            row += [f"{kept / len(documents):.0%}", f"{size / elapsed_s:.2f}"]
        started = time.process_time()
        tokenizer.encode_batch_fast(documents, add_special_tokens=False)
        row.append(f"{size / (time.process_time() - started):.2f}")
        rows.append(row)
        print(row, flush=True)
    publish_table(rows, RESULT, RESULT.parents[1] / "data.md")


if __name__ == "__main__":
    main(sys.argv[1])
