"""moefy turns a dense language model into a Mixture-of-Experts model.

>>> import moefy
>>> moefy.convert("smollm2-135m", "out/moe", experts=16, active=4)   # doctest: +SKIP

The verbs of the command line are functions of this module. Importing it imports neither torch nor
transformers: each verb brings what it needs when it is first used.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from moefy.version import __version__ as __version__

if TYPE_CHECKING:  # for editors and mypy; a test compares these lines with the table
    from moefy.checkpoint.cost import inspect as inspect
    from moefy.checkpoint.gguf_export import export_gguf as export_gguf
    from moefy.checkpoint.load import load_model
    from moefy.checkpoint.push import push as push
    from moefy.construct.convert import convert as convert
    from moefy.construct.merge import export_dense as export_dense
    from moefy.data.prepare import prepare as prepare
    from moefy.errors import MoefyError as MoefyError
    from moefy.evaluation.chat import chat as chat
    from moefy.evaluation.compare import evaluate as evaluate
    from moefy.evaluation.judge import judge as judge
    from moefy.evaluation.routing import RoutingResult
    from moefy.evaluation.routing import measure_routing as measure_routing
    from moefy.evaluation.speed import measure_speed as measure_speed
    from moefy.evaluation.suite import evaluate_suite as evaluate_suite
    from moefy.report.write import write_report as write_report
    from moefy.studies.plan import plan as plan
    from moefy.studies.run import study as study
    from moefy.studies.search import search as search
    from moefy.training.run import train as train
    from moefy.training.tune import tune as tune

    bench, load, suite = measure_speed, load_model, evaluate_suite
    routing: Callable[..., RoutingResult]

_HOME = {
    "MoefyError": "errors.MoefyError",
    "bench": "evaluation.speed.measure_speed",
    "chat": "evaluation.chat.chat",
    "convert": "construct.convert.convert",
    "evaluate": "evaluation.compare.evaluate",
    "evaluate_suite": "evaluation.suite.evaluate_suite",
    "export_dense": "construct.merge.export_dense",
    "export_gguf": "checkpoint.gguf_export.export_gguf",
    "inspect": "checkpoint.cost.inspect",
    "load": "checkpoint.load.load_model",
    "judge": "evaluation.judge.judge",
    "measure_routing": "evaluation.routing.measure_routing",
    "measure_speed": "evaluation.speed.measure_speed",
    "plan": "studies.plan.plan",
    "prepare": "data.prepare.prepare",
    "push": "checkpoint.push.push",
    "routing": "evaluation.routing.measure_routing",
    "search": "studies.search.search",
    "study": "studies.run.study",
    "suite": "evaluation.suite.evaluate_suite",
    "train": "training.run.train",
    "tune": "training.tune.tune",
    "write_report": "report.write.write_report",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        # before torch is imported, which reads the environment once
        import_module("moefy.hardware").ask_for_huge_pages()
        module, _, attribute = _HOME[name].rpartition(".")
        return getattr(import_module(f"moefy.{module}"), attribute)
    raise AttributeError(f"module 'moefy' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
