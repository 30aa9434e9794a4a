"""The leaderboard measures what it says, keeps every row, and refuses what it cannot do."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moefy
from moefy.errors import OutputError, UsageError
from moefy.studies.methods import METHODS

SMALL: dict[str, Any] = {
    "experts": 8,
    "calibration_tokens": 1024,
    "windows": 3,
    "sequence_length": 64,
}


def test_every_method_gets_a_row(
    make_llama: Callable[..., Path], corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "board"
    dense = make_llama(intermediate_size=256)
    scores = moefy.leaderboard(dense, out, data=corpus, fractions=[0.5], **SMALL)
    assert [score.method for score in scores] == ["dense", *(method.name for method in METHODS)]
    reference = moefy.evaluate(
        dense, data=corpus, windows=3, sequence_length=64, decode=False
    ).results[0]
    by_name = {score.method: score for score in scores}
    assert by_name["dense"].kl_to_dense == pytest.approx(0, abs=1e-7)
    assert max(by_name["dense"].ffn_error) == 0
    assert 2.718281828 ** by_name["dense"].loss == pytest.approx(reference.perplexity, rel=1e-4)
    refit, plain = by_name["moefy: aim at the FFN"], by_name["moefy: no repair"]
    assert refit.ffn_error[0] < plain.ffn_error[0] < 1
    assert by_name["moefy: oracle router"].router_gap_closed == pytest.approx(1)
    assert by_name["random"].router_gap_closed < by_name["moefy"].router_gap_closed
    identity = by_name["all experts (k = E)"]
    assert abs(identity.nats_above_dense) < 1e-6
    assert (identity.active, identity.experts) == (8, 8)
    assert by_name["moefy: 16 slices"].active == 8
    assert by_name["FLAP (static)"].router_gap_closed is None
    with (out / "leaderboard.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == [score.method for score in scores]
    assert {"loss_ab", "loss_xyz", "ffn_error_1"} <= rows[0].keys()
    assert float(rows[0]["perplexity_ab"]) == pytest.approx(
        2.718281828 ** float(rows[0]["loss_ab"]), rel=1e-6
    )
    assert (out / "leaderboard.png").stat().st_size > 10_000
    assert "| FLAP (static) | 4/8 | 4 |" in (out / "leaderboard.md").read_text()


def test_an_interrupted_leaderboard_continues(
    make_llama: Callable[..., Path], corpus: Path, tmp_path: Path
) -> None:
    dense, out = make_llama(intermediate_size=256), tmp_path / "board"
    common = {"data": corpus, "fractions": [0.5], **SMALL}
    first = moefy.leaderboard(dense, out, methods=["FLAP"], **common)
    before = (out / "scores.jsonl").read_text()
    both = moefy.leaderboard(dense, out, methods=["FLAP", "no repair"], **common)
    assert both[:2] == first
    assert (out / "scores.jsonl").read_text().startswith(before)
    with pytest.raises(OutputError, match="another model, text or seed"):
        moefy.leaderboard(dense, out, seed=1, **common)
    shutil.copytree(corpus, tmp_path / "moved")
    moved = common | {"data": tmp_path / "moved"}
    assert moefy.leaderboard(dense, out, methods=["FLAP"], **moved) == both
    lines = (corpus / "ab.jsonl").read_text().splitlines(keepends=True)
    (corpus / "ab.jsonl").write_text("".join(reversed(lines)))
    with pytest.raises(OutputError, match="another model, text or seed"):
        moefy.leaderboard(dense, out, methods=["FLAP"], **common)
    (corpus / "ab.jsonl").write_text("".join(lines))
    (out / "scores.jsonl").write_text(before + '{"method": "torn')
    with pytest.raises(OutputError, match=r"scores.jsonl, line 3 is no score.*remove the line"):
        moefy.leaderboard(dense, out, **common)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is a file"):
        moefy.leaderboard(dense, tmp_path / "file", **common)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({"fractions": [0.3]}, "0.3 of 8 experts is no whole number"),
        ({"fractions": [1.0]}, "no whole number between 1 and 7"),
        ({"methods": ["magic"]}, "no method matches 'magic'; there are moefy;"),
        ({"methods": ["FLAP", "magik"]}, "no method matches 'magik'"),
        ({"experts": 7, "fractions": [3 / 7]}, "cannot be split into 7 equal experts"),
    ],
)
def test_bad_grids_are_refused(
    make_llama: Callable[..., Path],
    corpus: Path,
    tmp_path: Path,
    choices: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(UsageError, match=message):
        moefy.leaderboard(make_llama(), tmp_path / "board", data=corpus, **SMALL | choices)
    assert not (tmp_path / "board").exists()
