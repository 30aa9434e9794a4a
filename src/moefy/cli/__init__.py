"""The command line: one short function per command; the only place that prints or exits.

A module holds the commands of the package that it is named after.
"""

from moefy.cli import (  # noqa: F401  (they join app)
    construct,
    demo,
    evaluation,
    studies,
    training,
    tuning,
)
from moefy.cli.app import app, main

__all__ = ["app", "main"]
