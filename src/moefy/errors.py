"""The error tree. Every error a user can cause is one of these; anything else is our bug.

    MoefyError                  run time, exit code 1
    ├── AssetError              something could not be fetched or its hash is wrong
    ├── JudgeError              the judge of a model's answers cannot be asked
    ├── HubError                the hub does not take a model
    ├── EvaluationError         a benchmark could not be measured
    ├── TrainingError           training stopped because it could not go on (a NaN loss)
    └── UsageError              what was asked for cannot be done here, exit code 2
        ├── StorageError        the disk is full or refuses to be written
        ├── CheckpointError     the folder or file is no model, or a broken one
        ├── ArchitectureError   a model, but not one that can be converted exactly
        ├── CorpusError         text that cannot be read or is too little
        └── OutputError         the output folder is in the way

A message says what was found, what is allowed and how to fix it.
"""

from __future__ import annotations

import re

_SECRET = re.compile(
    r"(?<=:/)(/?)[^/\s@]+@"  # of https://name:password@host, or of the same as a path
    r"|([?&][\w.-]*(?:key|token|secret|passw|sig|auth)[\w.-]*=)[^&\s\"']+",
    re.IGNORECASE,
)


class MoefyError(Exception):
    """Base of all errors that moefy raises on purpose."""

    exit_code = 1


class AssetError(MoefyError):
    """A pinned archive could not be fetched, or is not the one that was pinned."""


class JudgeError(MoefyError):
    """The judge's endpoint gives no answer."""


class HubError(MoefyError):
    """The hub does not take a model, or cannot be reached; nothing here has changed."""


class EvaluationError(MoefyError):
    """A benchmark could not be measured; the others' results are kept."""


class TrainingError(MoefyError):
    """Training cannot go on."""


class UsageError(MoefyError):
    """What was asked for cannot be done; nothing half-written is left."""

    exit_code = 2


class StorageError(UsageError):
    """The disk is full or the place cannot be written."""


class CheckpointError(UsageError):
    """The source is no model checkpoint, or a damaged one."""


class ArchitectureError(UsageError):
    """The source is a model that no rule of moefy converts exactly."""


class CorpusError(UsageError):
    """The text is missing, broken or too little."""


class OutputError(UsageError):
    """The output folder exists, or lies where it must not."""


def reason(error: object, longest: int = 200) -> str:
    """Return a library's error, or another's words, as a part of one line of ours."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= longest else f"{text[:longest]}…"


def without_secrets(text: str) -> str:
    """Return a text whose addresses have no passwords, keys and tokens, as it may be shown."""
    return _SECRET.sub(r"\1\2", text)
