"""Lines of a corpus to token ids by domain: what a worker process of `prepare` does.

Nothing here imports torch, so that a worker starts in a moment.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from moefy.data.domains import is_held_out
from moefy.data.packing import encode_documents
from moefy.data.quality import gopher
from moefy.data.records import field, record_of
from moefy.errors import CorpusError
from moefy.recipe import PrepareRecipe

_PLAIN_NAME = re.compile(r"\w[\w.+-]{0,99}")
FILTERED = "filtered:"
_EXAMPLES = 5


@dataclass(frozen=True)
class Lines:
    """Some lines of one source."""

    label: str  # begins a line's place in messages, as in "web.jsonl, line"
    domain: str | None
    first_line: int
    content: bytes  # none at a source's end
    after: tuple[int, int]  # source and batch to go on with once this one is done
    read_bytes: int  # of all sources, as they lie on disk, up to here
    finished: dict[str, Any] | None = None  # the source's record, at its end


@dataclass
class Tokenised:
    """What came of some lines."""

    ids: dict[str, bytes]  # by "domain/side", in the order of the lines, as they go to disk
    counts: dict[str, Counter[str]]  # by domain; "" holds lines whose domain cannot be known
    broken: list[str]  # the first messages on lines that were skipped


@dataclass(frozen=True)
class Tokeniser:
    """Turns lines into token ids; each worker process has a copy."""

    backend: Tokenizer
    eos: int
    dtype: str  # numpy's name of the ids' type on disk
    recipe: PrepareRecipe

    @cached_property
    def _broken_rule(self) -> Callable[[str], str | None] | None:
        return gopher() if self.recipe.filter == "gopher" else None

    def __call__(self, lines: Lines) -> Tokenised:
        """Parse, filter, split and tokenise.

        Raises:
            CorpusError: a line is broken, unless the recipe skips these.
        """
        texts: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
        done = Tokenised({}, defaultdict(Counter), [])
        for number, line in enumerate(lines.content.split(b"\n"), start=lines.first_line):
            if not line.strip():
                continue
            where, domain = f"{lines.label} {number}", lines.domain
            try:
                record, text = record_of(line, where, self.recipe.text_key)
                if domain is None:
                    domain = self._domain(record, where)
            except CorpusError as error:
                if not self.recipe.skip_broken:
                    raise CorpusError(
                        f"{error}; pass --skip-broken to go on without such lines, or mend it and "
                        "start again with --overwrite"
                    ) from error
                done.counts[domain or ""]["broken_lines"] += 1
                done.broken = [*done.broken, str(error)][:_EXAMPLES]
                continue
            # Filtered before it is split: a held-out document has passed the same rules.
            if not text:
                done.counts[domain]["empty"] += 1
            elif rule := self._filtered(domain, text):
                done.counts[domain][FILTERED + rule] += 1
            else:
                texts[domain, "heldout" if is_held_out(text) else "train"].append(text)
        for (domain, side), documents in texts.items():
            ids = encode_documents(self.backend, self.eos, documents)
            done.ids[f"{domain}/{side}"] = np.array(ids, dtype=self.dtype).tobytes()
            prefix = "" if side == "train" else "heldout_"
            done.counts[domain][f"{prefix}documents"] += len(documents)
            done.counts[domain][f"{prefix}characters"] += sum(map(len, documents))
            done.counts[domain][f"{prefix}tokens"] += len(ids)
        return done

    def _filtered(self, domain: str, text: str) -> str | None:
        domains = self.recipe.filter_domains
        if self._broken_rule is None or (domains is not None and domain not in domains):
            return None
        return self._broken_rule(text)

    def _domain(self, record: dict[str, Any], where: str) -> str:
        key, names = self.recipe.domain_key or "", self.recipe.allowed_names
        try:
            found = field(record, key)
        except (KeyError, TypeError):
            raise CorpusError(f"{where}: there is no domain in {key!r}") from None
        if names is not None:
            if not isinstance(found, str) or found not in names:
                raise CorpusError(f"{where}: {key!r} is {found!r}; allowed are {', '.join(names)}")
            return names[found]
        # a domain becomes a folder of the corpus: nothing that leads out of it may be one
        if not (isinstance(found, str) and _PLAIN_NAME.fullmatch(found)):
            raise CorpusError(
                f"{where}: {key!r} is {found!r}, which cannot name a folder: give names with "
                "domain_names in a recipe"
            )
        return found
