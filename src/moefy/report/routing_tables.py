"""What routers do, as tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moefy.report.tables import Rows

if TYPE_CHECKING:
    from moefy.evaluation.routing import RoutingResult


def k_rows(result: RoutingResult) -> Rows:
    """Return header and rows of the quality by number of chosen experts, a model and k a row."""
    raise NotImplementedError


def routing_rows(result: RoutingResult) -> Rows:
    """Return header and rows of the load, a layer of a model a row, below them the model's mean."""
    raise NotImplementedError
