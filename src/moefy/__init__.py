"""moefy turns a dense LLaMA-family language model into a Mixture-of-Experts model.

>>> import moefy
>>> moefy.convert("smollm2-135m", "out/moe", experts=16, active=4)   # doctest: +SKIP

The verbs of the command line are functions of this module. Importing it imports neither torch nor
transformers: each verb brings what it needs when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moefy.checkpoint.gguf import export_gguf
    from moefy.checkpoint.inspect import inspect
    from moefy.construct.convert import convert
    from moefy.construct.merge import export_dense
    from moefy.data.prepare import prepare
    from moefy.errors import MoefyError
    from moefy.evaluation.chat import chat
    from moefy.evaluation.compare import evaluate
    from moefy.evaluation.judge import judge
    from moefy.evaluation.routing import measure_routing
    from moefy.evaluation.speed import measure_speed
    from moefy.evaluation.suite import evaluate_suite
    from moefy.report.write import write_report
    from moefy.studies.leaderboard import leaderboard
    from moefy.studies.plan import plan
    from moefy.studies.run import study
    from moefy.training.run import train
    from moefy.training.tune import tune

__version__ = "0.1.0"
__all__ = [
    "MoefyError",
    "chat",
    "convert",
    "evaluate",
    "evaluate_suite",
    "export_dense",
    "export_gguf",
    "inspect",
    "judge",
    "leaderboard",
    "measure_routing",
    "measure_speed",
    "plan",
    "prepare",
    "study",
    "train",
    "tune",
    "write_report",
]

_HOME = {
    "MoefyError": "moefy.errors",
    "chat": "moefy.evaluation.chat",
    "convert": "moefy.construct.convert",
    "evaluate": "moefy.evaluation.compare",
    "evaluate_suite": "moefy.evaluation.suite",
    "export_dense": "moefy.construct.merge",
    "export_gguf": "moefy.checkpoint.gguf",
    "inspect": "moefy.checkpoint.inspect",
    "judge": "moefy.evaluation.judge",
    "leaderboard": "moefy.studies.leaderboard",
    "measure_routing": "moefy.evaluation.routing",
    "measure_speed": "moefy.evaluation.speed",
    "plan": "moefy.studies.plan",
    "prepare": "moefy.data.prepare",
    "study": "moefy.studies.run",
    "train": "moefy.training.run",
    "tune": "moefy.training.tune",
    "write_report": "moefy.report.write",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        import_module("moefy.hardware").ask_for_huge_pages()
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'moefy' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
