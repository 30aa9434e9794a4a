"""What only Linux has is not needed: simulated, because no other system is at hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.conftest import write_tiny_llama

SCRIPT = """
import importlib, os, pkgutil, sys
import moefy

def import_all():
    for module in pkgutil.walk_packages(moefy.__path__, "moefy."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)

# the libraries find the system that there is, and only moefy finds another one
from transformers import GraniteMoeSharedForCausalLM, LlamaForCausalLM, LlamaTokenizerFast
import_all()
for name in [name for name in sys.modules if name.partition(".")[0] == "moefy"]:
    del sys.modules[name]

platform, here = sys.argv[1:]

def refuse(event, arguments):
    if event == "open" and str(arguments[0]).startswith("/proc/"):
        raise FileNotFoundError(arguments[0])

sys.addaudithook(refuse)
sys.platform = platform
linux_only = ["O_DIRECT", "register_at_fork"]
if platform == "win32":
    sys.modules["fcntl"] = sys.modules["resource"] = sys.modules["readline"] = None
    linux_only += ["pread", "pwrite", "O_NOFOLLOW", "fork"]
for name in linux_only:
    delattr(os, name)

import moefy
import_all()

from moefy.hardware import freed_memory_kept, peak_rss_bytes, rss_bytes
assert rss_bytes() == 0
assert (peak_rss_bytes() > 0) == (platform == "darwin")
with freed_memory_kept():
    done = moefy.convert(
        f"{here}/dense", f"{here}/moe", experts=4, active=2, effort="fast",
        data=f"{here}/text.jsonl", calibration_tokens=256, calibration_length=32,
    )
moefy.convert(f"{here}/dense", done.folder, experts=4, active=2, partition="random",
              router="random", repair="none", overwrite=True)
found = moefy.evaluate(done.folder, data=f"{here}/text.jsonl", split="all", windows=1,
                       sequence_length=32)
print(found.results[0].perplexity)
"""


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_a_model_is_converted_without_what_only_linux_has(platform: str, tmp_path: Path) -> None:
    write_tiny_llama(tmp_path / "dense")
    lines = (f'{{"text": "{number} abc {number * number} xyz"}}\n' * 3 for number in range(200))
    (tmp_path / "text.jsonl").write_text("".join(lines))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, platform, str(tmp_path)],
        env=os.environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 1
    assert not [file.name for file in tmp_path.iterdir() if file.name.startswith(".")]
