"""A model folder goes to the Hugging Face hub, with its card and licence, in one commit."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moefy.checkpoint.card import HUB_NAME, RECORD, read_record
from moefy.checkpoint.reader import INDEX, side_files, tensor_files, weight_files
from moefy.errors import CheckpointError, HubError, MoefyError, UsageError, reason
from moefy.progress import Progress, ProgressFn, silent
from moefy.run_folder import foreign_files, read_marker

_CARD = "README.md"
_PARTS = ("config.json", RECORD, "partition.npy", INDEX)  # besides weights, tokenizer and card
_WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_REFUSED = {
    401: "does not know the token: log in again with `hf auth login`, or set another HF_TOKEN",
    403: "does not let this token write there: give it write access, or choose another OWNER",
    404: "has no such place for this token: check OWNER, and what the token may write to",
}


@dataclass(frozen=True)
class Pushed:
    """What `push` uploaded."""

    url: str
    license: str
    files: dict[str, int]  # bytes by name


def push(
    folder: str | Path,
    name: str,
    *,
    license: str | None = None,
    private: bool = False,
    report: ProgressFn = silent,
) -> Pushed:
    """Upload a model that moefy wrote to the Hugging Face hub, all files in one commit.

    Weights, config, tokenizer, model card and moefy.json are uploaded, and no logs or checkpoints.
    The token is what `hf auth login` stored, or `HF_TOKEN`.

    Args:
        folder: what `convert`, `train`, `tune` or `export_dense` wrote.
        name: `OWNER/MODEL` on the hub; made if there is none, else it gets a new commit.
        license: the hub's identifier, as in apache-2.0; needed where the card names none.
        private: only OWNER sees the model.
        report: told about progress.

    Raises:
        UsageError: the folder is not whole, holds other files, or has no licence; nothing is sent.
        HubError: there is no token, or the hub refuses or cannot be reached; no commit is made.
    """
    files, card = to_push(folder, license)
    return upload(Path(folder).expanduser(), files, card, name, private=private, report=report)


def upload(
    folder: Path, files: dict[str, int], card: Any, name: str, *, private: bool, report: ProgressFn
) -> Pushed:
    """Do what `push` does with the files and the card that `to_push` returned."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    if not HUB_NAME.fullmatch(name):
        raise UsageError(
            f"{name} is no place on the hub: write OWNER/MODEL, as in someone/moe-135m"
        )
    if not get_token():
        raise HubError("the hub needs a token: log in with `hf auth login`, or set HF_TOKEN")
    report(Progress(f"upload to {name}", 0, 1))
    with _hub_errors(name):
        api = HfApi(library_name="moefy")
        url = api.create_repo(name, private=private or None, exist_ok=True)
        found = api.model_info(name)
        if private and not found.private:
            raise UsageError(f"{name} exists and is public: leave --private out, or choose another")
        there = [file.rfilename for file in found.siblings or ()]
        # of an earlier push with other shards, which loaders would take first
        old = [file for file in there if _WEIGHTS.fullmatch(file) and file not in files]
        api.create_commit(
            name,
            [CommitOperationAdd(file, folder / file) for file in files if file != _CARD]
            + [CommitOperationAdd(_CARD, str(card).encode())]
            + [CommitOperationDelete(file) for file in old],
            commit_message="Upload a model with moefy",
        )
    report(Progress(f"upload to {name}", 1, 1))
    return Pushed(str(url), card.data["license"], files)


def to_push(folder: str | Path, license: str | None) -> tuple[dict[str, int], Any]:
    """Return the bytes of each file that would be uploaded, and the card with its licence.

    Raises:
        UsageError: the folder is not whole, holds other files, or has no licence.
    """
    from huggingface_hub import ModelCard

    folder = Path(folder).expanduser()
    marker = read_marker(folder)
    if marker is None or marker.kind != "model" or read_record(folder) is None:
        raise CheckpointError(
            f"{folder} is no model that moefy wrote: name the folder of a `moefy convert`, `train` "
            "or `tune`"
        )
    if marker.state != "finished":
        raise CheckpointError(f"{folder} is unfinished: the command that began it completes it")
    if foreign := list(foreign_files(folder)):
        shown = ", ".join(foreign[:10]) + ", …" * (len(foreign) > 10)
        raise UsageError(f"{folder} holds what moefy did not write: move {shown} away")
    # names without a suffix are of folders that a finished run has removed
    if gone := [
        each for each in marker.files if Path(each).suffix and not (folder / each).exists()
    ]:
        raise CheckpointError(f"{folder} is not whole: {', '.join(gone)} is missing; make it again")
    tensor_files(folder)  # every header is read, and the files' sizes are compared with it
    beside = [file.name for file in side_files(folder)]
    names = [
        name for name in (*_PARTS, *beside, *weight_files(folder)) if (folder / name).is_file()
    ]
    try:
        card = ModelCard((folder / _CARD).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / _CARD} is no model card: {reason(error)}") from error
    known = card.data.get("license")
    if not (known or license):
        raise UsageError(
            f"{folder / _CARD} names no licence: pass that of the dense model, as in "
            "--license apache-2.0"
        )
    if known and license and known != license:
        raise UsageError(
            f"{folder / _CARD} says that the licence is {known}: leave --license {license} out, or "
            "change the file"
        )
    card.data["license"] = known or license
    sizes = {name: (folder / name).stat().st_size for name in names}
    return {**sizes, _CARD: len(str(card).encode())}, card


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Translate what the hub answers, and what its library raises, whatever its type."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except MoefyError:
        raise
    except Exception as error:
        # of an upload in a thread, the library says only which file it was
        cause = error.__cause__ if type(error) is RuntimeError and error.__cause__ else error
        again = "nothing is published; run the same command again, what arrived is not sent twice"
        if isinstance(cause, HfHubHTTPError):
            code = cause.response.status_code
            said = _REFUSED.get(code, f"answers {code} ({reason(cause)}): {again}")
            raise HubError(f"{name}: the hub {said}") from error
        raise HubError(f"{name}: the upload failed ({reason(cause)}): {again}") from error
