"""Ways to build experts, measured side by side on the same tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from moefy.calibrate.text import calibration_windows, self_windows
from moefy.checkpoint.reader import DenseCheckpoint, fingerprint
from moefy.checkpoint.source import resolve
from moefy.evaluation.heldout import evaluation_windows
from moefy.progress import ProgressFn, silent
from moefy.storage import refuse_file, storage_errors
from moefy.studies.bench import Bench
from moefy.studies.methods import methods_named
from moefy.studies.scores import (
    Score,
    key_of,
    read_scores,
    write_leaderboard,
    write_scores,
)


def leaderboard(
    source: str | Path,
    out: str | Path,
    *,
    data: str | Path = "demo",
    experts: int = 64,
    fractions: Sequence[float] = (0.75, 0.5, 0.25),
    methods: Sequence[str] = (),
    calibration_tokens: int = 28_672,
    windows: int = 8,
    sequence_length: int = 512,
    seed: int = 0,
    report: ProgressFn = silent,
) -> list[Score]:
    """Measure ways to build experts on the same tokens; write table, CSV and figure.

    Every row is kept in `out/scores.jsonl` as soon as it is measured; the same command continues
    an interrupted run and measures only what is missing. The table shows every row in the folder.

    Args:
        source: anything `convert` takes.
        out: folder for `scores.jsonl`, `leaderboard.csv`, `leaderboard.md` and `leaderboard.png`.
        data: a folder of `<domain>.jsonl(.gz)` files, or `demo`. Calibration reads the training
            documents, evaluation the held-out ones.
        experts: slices of every FFN.
        fractions: of the FFN that run per token.
        methods: names of rows, or parts of names; none means all.
        calibration_tokens: for the methods that need them.
        windows: evaluation windows per domain.
        sequence_length: tokens per window.
        seed: of every method.
        report: told about progress.

    Raises:
        UsageError: a fraction, method, model or text that is not usable.
        OutputError: `out` is a file, or its scores are of another model, text or seed.
    """
    chosen = methods_named(methods)
    dense = DenseCheckpoint(resolve(source, report=report))
    inner = dense.config["intermediate_size"]
    wanted = [
        (method, method.recipe(experts, fraction, seed).for_model(inner))
        for fraction in fractions
        for method in chosen
    ]
    out = Path(out).expanduser()
    refuse_file(out)
    calibration = calibration_windows(
        data,
        dense.folder,
        tokens=calibration_tokens,
        sequence_length=sequence_length,
        needed_tokens=inner,
        report=report,
    )
    evaluation = evaluation_windows(
        data,
        dense.folder,
        windows=windows,
        sequence_length=sequence_length,
        report=report,
    )
    texts = {"calibration": calibration, **evaluation}
    conditions = {
        "source": fingerprint(dense.folder),
        "text": {name: hashlib.sha256(ids.tobytes()).hexdigest() for name, ids in texts.items()},
        "calibration_tokens": calibration_tokens,
        "sequence_length": sequence_length,
        "seed": seed,
    }
    key = hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()[:12]
    known = read_scores(out, key)
    own_text = partial(
        self_windows,
        dense.folder,
        tokens=calibration_tokens,
        sequence_length=sequence_length,
        seed=seed,
        report=report,
    )
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    bench = None
    for method, recipe in wanted:
        split = recipe.split
        score = known.get((method.name, split.experts, split.active))
        if score is None or score.recipe != recipe.model_dump(mode="json"):
            bench = bench or Bench(dense, calibration, evaluation, seed=seed, own_text=own_text)
            score = bench.score(method, recipe, report)
            known = {key_of(s): s for s in (bench.dense_score, *known.values(), score)}
            write_scores(out, key, known.values())
    scores = list(known.values())
    write_leaderboard(out, scores)
    return scores
