"""The command line: one short function per command; the only place that prints or exits.

A module holds the commands of the package that it is named after.
"""

from moefy.cli import construct, evaluation, studies, training  # noqa: F401  (they join app)
from moefy.cli.app import app, main

__all__ = ["app", "main"]
