"""What a GPU's name means."""

from __future__ import annotations

import pytest
from gpu import known_gpu


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L40", None),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA A10G", None),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
    ],
)
def test_names_of_gpus(name: str, meant: str | None) -> None:
    assert known_gpu(name) == meant
