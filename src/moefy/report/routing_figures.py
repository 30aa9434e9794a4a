"""What routers do, as figures."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from moefy.evaluation.routing import RoutingResult


def routing_figures(result: RoutingResult) -> dict[str, Figure]:
    """Draw what there is to see, by file name.

    Of every model `load`, `domains` and `coactivation`, with the model's number in front of
    `.png` where there are several (`routing-load-2.png`); of all together `routing-k.png`.
    """
    raise NotImplementedError
