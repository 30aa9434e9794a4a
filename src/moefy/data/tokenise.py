"""Documents to token ids: windows for training, and the work of the processes of `prepare`.

Nothing here imports torch, so that a process starts in a moment.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer

from moefy.data.records import field, folder_name, is_held_out, record_of
from moefy.errors import CorpusError, MoefyError
from moefy.recipe import PrepareRecipe

_EXAMPLES = 5
_AHEAD = 4


def encode_documents(backend: Tokenizer, eos: int | None, documents: list[str]) -> list[int]:
    """Return the ids of documents, one after another, each with the end-of-text token behind it.

    Special tokens that stand in a text are read as text: no document can end itself.
    """
    # transformers sets these before each call of its own, so nothing has to be put back
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    end = [] if eos is None else [eos]
    ids: list[int] = []
    for encoding in backend.encode_batch_fast(documents, add_special_tokens=False):
        ids += encoding.ids
        ids += end
    return ids


def backend_of(tokenizer: Any, name: str) -> Tokenizer:
    """Return the fast part of a transformers tokenizer; a CorpusError if it has none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise CorpusError(f"the tokenizer of {name} is no fast one: save it with a tokenizer.json")
    return backend


def pack(
    documents: Iterator[str], tokenizer: Any, *, sequence_length: int, max_windows: int
) -> Int[np.ndarray, "windows sequence"]:
    """Tokenise documents, join them with the end-of-text token, and cut windows, as in the paper.

    Args:
        documents: texts; only as many are read as the windows need.
        tokenizer: a fast transformers tokenizer.
        sequence_length: tokens per window.
        max_windows: stop after so many.

    Returns:
        Token ids as int64; fewer windows than asked for when the documents run out, possibly none.
    """
    backend = backend_of(tokenizer, tokenizer.name_or_path)
    ids: list[int] = []
    # A few at a time: the encodings of a batch take many times the memory of its text.
    while len(ids) < max_windows * sequence_length and (batch := list(islice(documents, 16))):
        ids += encode_documents(backend, tokenizer.eos_token_id, batch)
    num_windows = min(len(ids) // sequence_length, max_windows)
    flat = np.array(ids[: num_windows * sequence_length], dtype=np.int64)
    return flat.reshape(num_windows, sequence_length)


@dataclass(frozen=True)
class Lines:
    """Some lines of one source."""

    label: str  # begins a line's place in messages, as in "web.jsonl, line"
    domain: str | None
    text_key: str
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

    def __call__(self, lines: Lines) -> Tokenised:
        """Parse, split and tokenise.

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
                record, text = record_of(line, where, lines.text_key)
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
            if text:
                texts[domain, "heldout" if is_held_out(text) else "train"].append(text)
            else:
                done.counts[domain]["empty"] += 1
        for (domain, side), documents in texts.items():
            ids = encode_documents(self.backend, self.eos, documents)
            done.ids[f"{domain}/{side}"] = np.array(ids, dtype=self.dtype).tobytes()
            prefix = "" if side == "train" else "heldout_"
            done.counts[domain][f"{prefix}documents"] += len(documents)
            done.counts[domain][f"{prefix}characters"] += sum(map(len, documents))
            done.counts[domain][f"{prefix}tokens"] += len(ids)
        return done

    def _domain(self, record: dict[str, Any], where: str) -> str:
        key, names = self.recipe.domain_key or "", self.recipe.allowed_names
        try:
            found = field(record, key)
        except (KeyError, TypeError):
            raise CorpusError(f"{where}: there is no domain in {key!r}") from None
        if names is None:
            return folder_name(found, f"{where}, {key!r}")
        if not isinstance(found, str) or found not in names:
            raise CorpusError(f"{where}: {key!r} is {found!r}; allowed are {', '.join(names)}")
        return names[found]


def in_processes(
    tokeniser: Tokeniser, source: Iterator[Lines], workers: int
) -> Generator[tuple[Lines, Tokenised]]:
    """Yield lines with what came of them, in order, reading only a little ahead.

    Raises:
        CorpusError: a line is broken.
        MoefyError: a process was killed.
    """
    # Not forked: torch and the tokenizer may have started threads in this process.
    spawn = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, spawn, _begin_work, (tokeniser,))
    pending: deque[tuple[Lines, Future[Tokenised]]] = deque()
    try:
        # Far enough ahead that no process waits, near enough that memory stays bounded.
        for lines in source:
            pending.append((lines, pool.submit(_work, lines)))
            if len(pending) > _AHEAD * workers:
                done, result = pending.popleft()
                yield done, result.result()
        for done, result in pending:
            yield done, result.result()
    except BrokenProcessPool as error:
        raise MoefyError(
            "a worker process was killed, mostly for lack of memory: run the same command again, "
            "with fewer --workers (a script needs `if __name__ == '__main__':` around prepare)"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_tokeniser: Tokeniser  # of this worker process


def _begin_work(tokeniser: Tokeniser) -> None:
    global _tokeniser
    _tokeniser = tokeniser
    # there is a process for each core, so none may start threads of its own
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    # a pool's process would wait for ever for the work of a parent that was killed
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(lines: Lines) -> Tokenised:
    return _tokeniser(lines)
