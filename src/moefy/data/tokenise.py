"""One batch of JSON lines to token ids: what a worker process does. Imports no torch."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Integer
from tokenizers import Tokenizer

from moefy.data.domains import is_held_out
from moefy.data.jsonl import field, record_of
from moefy.data.quality import gopher
from moefy.errors import CorpusError
from moefy.recipe import PrepareRecipe

_PLAIN_NAME = re.compile(r"\w[\w.+-]{0,99}")
FILTERED = "filtered:"
_EXAMPLES = 5


@dataclass(frozen=True)
class Job:
    """What is the same for every batch.

    Attributes:
        tokenizer: its tokenizer.json.
        eos: id of the token that ends a document.
        dtype: of the ids on disk, little-endian.
        recipe: every choice.
    """

    tokenizer: str
    eos: int
    dtype: str
    recipe: PrepareRecipe


@dataclass(frozen=True)
class Batch:
    """Whole lines of one input.

    Attributes:
        name, domain: of the input.
        first_line: its number, from 1.
        content: the lines; none at an input's end.
        after: input and batch to go on with once this one is done.
        read_bytes: of all inputs, as they lie on disk, up to here.
        finished: the input's record, at its end.
    """

    name: str
    domain: str | None
    first_line: int
    content: bytes
    after: tuple[int, int]
    read_bytes: int
    finished: dict[str, Any] | None = None


@dataclass
class Tokenised:
    """What came of a batch.

    Attributes:
        ids: by (domain, split), the documents' ids in the order of the lines, each with the end
            token, as they go to disk.
        counts: by domain; "" holds lines whose domain cannot be known.
        broken: the first messages on lines that were skipped.
    """

    ids: dict[tuple[str, str], bytes]
    counts: dict[str, Counter[str]]
    broken: list[str]


class Tokeniser:
    """Turns batches into token ids; one lives in each worker.

    Special tokens that stand in a text are read as text: no document can end itself.

    Raises:
        UsageError: the filter's package is missing.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._tokenizer = Tokenizer.from_str(job.tokenizer)
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self._broken_rule = gopher() if job.recipe.filter == "gopher" else None

    def __call__(self, batch: Batch) -> Tokenised:
        """Parse, filter, split and tokenise.

        Raises:
            CorpusError: a broken line, unless the recipe skips these.
        """
        texts: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
        done = Tokenised({}, defaultdict(Counter), [])
        for number, line in enumerate(batch.content.split(b"\n"), start=batch.first_line):
            if not line.strip():
                continue
            domain = batch.domain
            try:
                record, text = record_of(
                    line, f"{batch.name}, line {number}", text_key=self._job.recipe.text_key
                )
                if domain is None:
                    domain = self._domain(record, f"{batch.name}, line {number}")
            except CorpusError as error:
                if not self._job.recipe.skip_broken:
                    raise CorpusError(
                        f"{error}; pass --skip-broken to go on without such lines, or mend it and "
                        "start again with --overwrite"
                    ) from error
                done.counts[domain or ""]["broken_lines"] += 1
                done.broken = [*done.broken, str(error)][:_EXAMPLES]
                continue
            if not text:
                done.counts[domain]["empty"] += 1
            elif rule := self._filtered(domain, text):
                done.counts[domain][FILTERED + rule] += 1
            else:
                texts[domain, "heldout" if is_held_out(text) else "train"].append(text)
        for (domain, split), documents in texts.items():
            ids = self._ids(documents)
            done.ids[domain, split] = ids.tobytes()
            prefix = "" if split == "train" else "heldout_"
            done.counts[domain].update(
                {
                    f"{prefix}documents": len(documents),
                    f"{prefix}characters": sum(map(len, documents)),
                    f"{prefix}tokens": len(ids),
                }
            )
        return done

    def _ids(self, documents: list[str]) -> Integer[np.ndarray, " tokens"]:
        ids: list[int] = []
        for encoding in self._tokenizer.encode_batch_fast(documents, add_special_tokens=False):
            ids += encoding.ids
            ids.append(self._job.eos)
        return np.fromiter(ids, np.dtype(self._job.dtype), len(ids))

    def _filtered(self, domain: str, text: str) -> str | None:
        domains = self._job.recipe.filter_domains
        if self._broken_rule is None or (domains is not None and domain not in domains):
            return None
        return self._broken_rule(text)

    def _domain(self, record: dict[str, Any], where: str) -> str:
        key, names = self._job.recipe.domain_key or "", self._job.recipe.allowed_names
        try:
            found = field(record, key)
        except (KeyError, TypeError):
            raise CorpusError(f"{where}: there is no domain in {key!r}") from None
        if names is not None:
            if not isinstance(found, str) or found not in names:
                raise CorpusError(f"{where}: {key!r} is {found!r}; allowed are {', '.join(names)}")
            return names[found]
        if not (isinstance(found, str) and _PLAIN_NAME.fullmatch(found)):
            raise CorpusError(
                f"{where}: {key!r} is {found!r}, which cannot name a folder: give names with "
                "domain_names in a recipe"
            )
        return found
