"""Named mixtures, update rules and reference losses, on numbers worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from moefy.data.strategies import (
    SLIMPAJAMA,
    STRATEGIES,
    find_strategy,
    initial_weights,
    llama_moe_update,
    published_reference,
    read_reference,
    sheared_llama_update,
    slimpajama_name,
)
from moefy.errors import CorpusError, UsageError

SHARED_DATA = ["arxiv", "book", "c4", "cc", "github", "stackexchange", "wikipedia"]
PUBLISHED = [
    "RedPajamaArXiv",
    "RedPajamaBook",
    "RedPajamaC4",
    "RedPajamaCommonCrawl",
    "RedPajamaGithub",
    "RedPajamaStackExchange",
    "RedPajamaWikipedia",
]
ORIGINAL = ["en_arxiv", "en_book", "en_c4", "en_cc", "github", "en_stack", "en_wikipedia"]


@pytest.mark.parametrize("domains", [SHARED_DATA, PUBLISHED, ORIGINAL])
def test_the_published_rows_under_the_corpus_names(domains: list[str]) -> None:
    sheared = [0.007, 0.091, 0.492, 0.361, 0.008, 0.01, 0.031]
    llama = [0.025, 0.045, 0.15, 0.67, 0.045, 0.02, 0.045]
    for name, row in {"Sheared": sheared, "LLaMA": llama}.items():
        for kind in ("Static", "Dynamic"):
            found = initial_weights(f"{kind}{name}", domains)
            assert found == dict(zip(domains, row, strict=True))
            assert math.fsum(found.values()) == pytest.approx(1, abs=1e-15)
    for name in ("Uniform", "DynamicUniform"):
        assert initial_weights(name, domains) == dict.fromkeys(domains, 1 / 7)
    assert {slimpajama_name(domain) for domain in domains} == set(SLIMPAJAMA)


def test_names_of_strategies_in_any_case() -> None:
    for strategy in STRATEGIES:
        assert find_strategy(strategy.name.lower()) is strategy
        assert strategy.is_dynamic == strategy.name.startswith("Dynamic")
    with pytest.raises(UsageError, match=r"unknown mixture 'Static'.*StaticLLaMA, .*weight for"):
        find_strategy("Static")


def test_another_corpus_has_the_uniform_mixtures_only() -> None:
    demo = ["book", "code", "news", "wikipedia"]
    assert initial_weights("uniform", demo) == dict.fromkeys(demo, 0.25)
    with pytest.raises(
        CorpusError,
        match=r"lack news and name cc, c4, arxiv, stackexchange besides; the corpus.*: use Uniform",
    ):
        initial_weights("StaticSheared", demo)
    with pytest.raises(
        CorpusError, match=r"name github besides; the corpus has .*: use DynamicUniform"
    ):
        initial_weights("DynamicLLaMA", [name for name in SHARED_DATA if name != "github"])
    with pytest.raises(CorpusError, match=r"StaticLLaMA, .* lack wiki.*; the corpus has"):
        initial_weights("StaticLLaMA", [*SHARED_DATA, "wiki"])


def test_weights_of_a_recipe() -> None:
    assert initial_weights({"b": 0.25, "a": 0.75}, ["a", "b"]) == {"a": 0.75, "b": 0.25}
    assert initial_weights({"code": 1.0, "x": 0.0}, ["github", "x"]) == {"github": 1.0, "x": 0.0}
    assert initial_weights({"a": 3.0, "b": 1.0}, ["a", "b"], normalise=True) == {
        "a": 0.75,
        "b": 0.25,
    }
    with pytest.raises(CorpusError, match=r"sum to 0.9: make them sum to 1, or set normalise_we"):
        initial_weights({"a": 0.5, "b": 0.4}, ["a", "b"])
    with pytest.raises(CorpusError, match="weights lack b and name c besides; the corpus has a, b"):
        initial_weights({"a": 0.5, "c": 0.5}, ["a", "b"])
    with pytest.raises(CorpusError, match="lack github and name code, RedPajamaGithub besides"):
        initial_weights({"code": 0.5, "RedPajamaGithub": 0.5}, ["github"])
    for broken in (-0.5, math.nan, math.inf):
        with pytest.raises(CorpusError, match=f"the weight of 'a' is {broken}: give 0"):
            initial_weights({"a": broken, "b": 1.5}, ["a", "b"])
    with pytest.raises(CorpusError, match="sum to 0: at least one"):
        initial_weights({"a": 0.0}, ["a"], normalise=True)


def test_the_update_rules_by_hand() -> None:
    """1/2 · e^0, 1/4 · e^ln 2, 1/4 · e^ln 4 are 1/2, 1/2, 1: of their sum 1/4, 1/4, 1/2."""
    weights = np.array([1 / 2, 1 / 4, 1 / 4])
    excess = np.log([1.0, 2.0, 4.0])
    smoothed = 0.9999 * np.array([0.25, 0.25, 0.5]) + 1e-4 / 3
    assert np.allclose(llama_moe_update(weights, excess), smoothed, rtol=0, atol=1e-15)
    excess[0] = -3.0  # below its reference: no reward, and no penalty
    found = sheared_llama_update(weights, excess)
    assert np.allclose(found, [0.25, 0.25, 0.5], rtol=0, atol=1e-15)
    # the code, unlike the paper, takes weight from a domain below its reference
    assert llama_moe_update(weights, excess)[0] < 0.02


def test_published_reference_losses_by_size() -> None:
    sizes = {6_738_415_616: 1.5899, 2_700_000_000: 1.6297, 1_345_000_000: 1.7590}
    for num_parameters, wiki in sizes.items():
        found = published_reference(SHARED_DATA, num_parameters=num_parameters, vocab_size=32_000)
        assert list(found) == SHARED_DATA
        assert found["wikipedia"] == wiki
    with pytest.raises(UsageError, match=r"for 0.135B parameters, only for 1.3B, 2.7B, 6.7B: take"):
        published_reference(SHARED_DATA, num_parameters=134_515_008, vocab_size=49_152)
    with pytest.raises(UsageError, match="32,000 tokens, and this model has 128,256"):
        published_reference(SHARED_DATA, num_parameters=8 * 10**9, vocab_size=128_256)
    with pytest.raises(CorpusError, match="published reference losses lack news and name"):
        published_reference(["cc", "news"], num_parameters=7 * 10**9, vocab_size=32_000)


def test_the_tables_in_the_docs() -> None:
    page = (Path(__file__).parents[2] / "docs/training.md").read_text()
    rows = [strategy.weights for strategy in STRATEGIES if strategy.weights]
    for size in (1.3, 2.7, 6.7):
        rows.append(
            published_reference(SLIMPAJAMA, num_parameters=int(size * 1e9), vocab_size=32_000)
        )
    for row in rows:
        assert f"| {' | '.join(str(row[name]) for name in SLIMPAJAMA)} |\n" in page


def test_reference_losses_from_a_file(tmp_path: Path) -> None:
    losses = {"wiki": 1.59, "news": 2}
    expected = {"news": 2, "wikipedia": 1.59}
    (tmp_path / "losses.json").write_text(json.dumps(losses, indent="\t"))
    assert read_reference(tmp_path / "losses.json", ["news", "wikipedia"]) == expected
    (tmp_path / "losses.yaml").write_text("wiki: 1.59\nnews: 2\n")
    assert read_reference(tmp_path / "losses.yaml", ["news", "wikipedia"]) == expected
    with pytest.raises(
        CorpusError, match=r"losses in .*losses.yaml lack book; the corpus has book"
    ):
        read_reference(tmp_path / "losses.yaml", ["book", "news", "wiki"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("wiki: 1.5 2.5", "'wiki': '1.5 2.5' is no loss"),
        ("wiki: -1.0", "'wiki': -1.0 is no loss"),
        ("wiki: .nan", "'wiki': nan is no loss"),
        ("wiki: true", "'wiki': True is no loss"),
        ("1: 1.5", "1: 1.5 is no loss"),
        ("- wiki", "must map domains to losses"),
        ("", "must map domains to losses"),
        ("a: [", "cannot be read"),
        ("a: \udcff", "cannot be read"),
    ],
)
def test_broken_reference_files_are_named(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "losses.yaml"
    file.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(UsageError, match=message):
        read_reference(file, ["wiki"])
    with pytest.raises(UsageError, match="cannot be read"):
        read_reference(tmp_path / "none.yaml", ["wiki"])
