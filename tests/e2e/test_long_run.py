"""A long run: memory does not grow with the steps."""

from __future__ import annotations

from pathlib import Path

from long_run import resident_bytes


def test_two_thousand_steps_in_flat_memory(tmp_path: Path) -> None:
    early, late = resident_bytes(tmp_path)
    print(f"resident set after step 200: {early >> 20} MiB, after 1,900: {late >> 20} MiB")
    assert late <= 1.05 * early
