"""Gopher's rules for dropping text of low quality, as datatrove implements them.

Rae et al., 2021 (arXiv 2112.11446), section A1.1: quality filtering (length, word length, symbols,
bullets, ellipses, alphabetic words, stop words) and repetition removal (Table A1).

Deviation: words are what whitespace separates. datatrove's own default for English is spaCy, which
makes every punctuation mark a word: the rule that 80% of the words have a letter then drops all of
arXiv and nearly all code, at a fifth of the speed of tokenising (docs/data.md).
"""

from __future__ import annotations

import os
from collections.abc import Callable

from moefy.errors import UsageError


def gopher() -> Callable[[str], str | None]:
    """Return a function that names the first rule a text breaks, or None for a text to keep.

    Raises:
        UsageError: datatrove is not installed.
    """
    # datatrove's logger writes every import to standard error otherwise.
    os.environ.setdefault("LOGURU_LEVEL", "WARNING")
    try:
        from datatrove.data import Document
        from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
        from datatrove.utils.word_tokenizers import WordTokenizer
    except ImportError:
        raise UsageError(
            "--filter gopher needs the datatrove package: pip install 'moefy[datatrove]'"
        ) from None

    class Whitespace(WordTokenizer):  # type: ignore[misc]
        def word_tokenize(self, text: str) -> list[str]:
            return text.split()

        # No rule of Gopher's counts sentences, but the base class is abstract in these.
        sent_tokenize = span_tokenize = word_tokenize

    words = Whitespace()
    filters = [GopherQualityFilter(language=words), GopherRepetitionFilter(language=words)]

    def broken_rule(text: str) -> str | None:
        document = Document(text=text, id="")
        for rule in filters:
            kept = rule.filter(document)
            if kept is not True:
                return kept[1] if isinstance(kept, tuple) else rule.name
        return None

    return broken_rule
