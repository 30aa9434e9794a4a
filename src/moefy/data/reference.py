"""Reference losses: where each domain's loss should come to, for mixtures that follow losses.

They are nats per token on a domain's held-out text. The best reference is the dense parent itself,
which the trainer measures; this file has the two others, a file and the published numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import yaml

from moefy.data.strategies import SLIMPAJAMA, for_domains
from moefy.errors import UsageError

_LLAMA_VOCAB_SIZE = 32_000
_LARGEST_RATIO = 1.6

_PUBLISHED = {  # by the dense model's billions of parameters; columns as in SLIMPAJAMA
    1.3: (1.9643, 2.1251, 0.7459, 1.7590, 2.1393, 1.4449, 1.6117),
    2.7: (1.8712, 2.0328, 0.6883, 1.6297, 2.0325, 1.3560, 1.5353),
    6.7: (1.6917, 2.0749, 0.6984, 1.5899, 1.9252, 1.2408, 1.4975),
}


def published_reference(
    domains: Iterable[str], *, num_parameters: int, vocab_size: int
) -> dict[str, float]:
    """Return the published losses of the row that is nearest to the parent's size.

    6.7B: LLaMA-2-7B measured on SlimPajama's validation sets (LLaMA-MoE, arXiv 2406.16554, its
    code's `LLAMA2_7B_SLIMPAJAMA_VAL_REF_LOSS`). 2.7B and 1.3B: what a LLaMA of that size would
    reach, by Sheared-LLaMA's scaling law (arXiv 2310.06694), on RedPajama's.

    Args:
        domains: the corpus's names.
        num_parameters: of the dense parent.
        vocab_size: of the dense parent. The losses are per token of LLaMA's 32,000.

    Returns:
        Nats per token by the corpus's names.

    Raises:
        UsageError: no row is near enough, or the tokenizer is another.
        CorpusError: the corpus does not have SlimPajama's seven domains.
    """
    billions = num_parameters / 1e9
    # Model sizes are compared by their ratio, as scaling laws do.
    size = min(_PUBLISHED, key=lambda row: abs(math.log(row / billions)))
    sizes = ", ".join(f"{row}B" for row in _PUBLISHED)
    instead = "take the dense model's own losses (reference_losses: dense) or a file"
    if max(size / billions, billions / size) > _LARGEST_RATIO:
        raise UsageError(
            f"no reference losses are published for {billions:.3g}B parameters, only for {sizes}: "
            f"{instead}"
        )
    if vocab_size != _LLAMA_VOCAB_SIZE:
        raise UsageError(
            f"the published reference losses are nats per token of LLaMA's {_LLAMA_VOCAB_SIZE:,} "
            f"tokens, and this model has {vocab_size:,}: {instead}"
        )
    row = dict(zip(SLIMPAJAMA, _PUBLISHED[size], strict=True))
    return for_domains(row, domains, what="the published reference losses")


def read_reference(file: str | Path, domains: Iterable[str]) -> dict[str, float]:
    """Read reference losses from a YAML or JSON file, as in `{wiki: 1.59, book: 1.93}`.

    Args:
        file: a mapping of domains to nats per token.
        domains: the corpus's names; the file may use other names of the same SlimPajama domains.

    Raises:
        UsageError: the file cannot be read, is no mapping, or holds something else than a positive
            number for a domain.
        CorpusError: a domain is missing, or one too many is there.
    """
    try:
        # JSON with tabs between its values is no YAML
        values = yaml.safe_load(Path(file).read_text().replace("\t", " "))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UsageError(f"the reference losses {file} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"{file} must map domains to losses, as in {{wiki: 1.59, book: 1.93}}")
    for domain, loss in values.items():
        is_number = isinstance(loss, int | float) and not isinstance(loss, bool)
        if not (isinstance(domain, str) and is_number and 0 < loss < math.inf):
            raise UsageError(
                f"{file}, {domain!r}: {loss!r} is no loss: write nats per token, as in 1.59"
            )
    losses = {domain: float(loss) for domain, loss in values.items()}
    return for_domains(losses, domains, what=f"the reference losses in {file}")
