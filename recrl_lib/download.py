"""Data sets from their origins over HTTP: resumed, retried, verified, and cached outside the repository.

A file is written to ``<name>.part`` and renamed when it is whole and verified, so a killed download goes on where it stopped: a
``Range`` request asks for the rest, with ``If-Range`` and the ETag of the first answer, so that a file changed at the origin meanwhile
is fetched anew. What a file is verified by: its sha256 where it is known; else the md5 that the origin publishes beside it; else (the
Amazon files, for which nothing is published) its size as the server states it, and gzip's own checksums when it is read.
"""

import hashlib
import http.client
import re
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from recrl_lib.assets import extract, move_into_place
from recrl_lib.paths import cache_dir
from recrl_lib.progress import track
from recrl_lib.runs import sha256_file, write_atomic

PIECE = 2**20
TIMEOUT = 60  # seconds without a byte
WAITS = (1, 4, 15)  # seconds before the second, third, ... try
_AGENT = {"User-Agent": "shielded-recrl"}


@dataclass(frozen=True)
class Remote:
    """A file at an origin. ``sha256`` or, if that is not known, ``md5_url``, a file with the md5 that the origin publishes, or neither."""

    url: str
    sha256: str = ""
    md5_url: str = ""

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class Origin:
    """Where a data set comes from. ``members``: what is unpacked from a zip; () if the files are used as they are."""

    files: tuple[Remote, ...]
    members: tuple[str, ...] = ()


_GROUPLENS = "https://files.grouplens.org/datasets/movielens/"
_MCAULEY = "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_2023/raw/"
_MCAULEY_2018 = "https://datarepo.eng.ucsd.edu/mcauley_group/data/amazon_v2/"
_MCAULEY_2014 = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/"
_CSV = ("ratings.csv", "movies.csv")
ORIGINS: dict[
    str, Origin
] = {  # the sha256 are those that TensorFlow Datasets records for these files
    "ml-25m": Origin(
        (
            Remote(
                _GROUPLENS + "ml-25m.zip",
                "8b21cfb7eb1706b4ec0aac894368d90acf26ebdfb6aced3ebd4ad5bd1eb9c6aa",
            ),
        ),
        _CSV,
    ),
    "ml-32m": Origin(
        (Remote(_GROUPLENS + "ml-32m.zip", md5_url=_GROUPLENS + "ml-32m.zip.md5"),), _CSV
    ),
    "ml-latest-small": Origin(
        (
            Remote(
                _GROUPLENS + "ml-latest-small.zip",
                "696d65a3dfceac7c45750ad32df2c259311949efec81f0f144fdfb91ebc9e436",
            ),
        ),
        _CSV,
    ),
    "amazon-books": Origin(
        (
            Remote(_MCAULEY + "meta_categories/meta_Books.jsonl.gz"),
            Remote(_MCAULEY + "review_categories/Books.jsonl.gz"),
        ),
    ),
    "amazon-books-2018": Origin(
        (
            Remote(_MCAULEY_2018 + "metaFiles2/meta_Books.json.gz"),
            Remote(_MCAULEY_2018 + "categoryFiles/Books.json.gz"),
        )
    ),
    "amazon-books-2014": Origin(
        (
            Remote(_MCAULEY_2014 + "meta_Books.json.gz"),
            Remote(_MCAULEY_2014 + "reviews_Books.json.gz"),
        )
    ),
}


def folder(name: str) -> Path:
    """The folder with the files of data set ``name``, fetched on first use. Raises ``RuntimeError`` naming the remedy."""
    target, origin = cache_dir("datasets") / name, ORIGINS[name]
    if target.is_dir() and (
        origin.members or all((target / remote.name).is_file() for remote in origin.files)
    ):
        return target
    if not origin.members:
        for remote in origin.files:
            fetch(remote, target)
        return target
    (remote,) = origin.files
    archive = fetch(remote, cache_dir("downloads"))
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        extract(archive, f"{name}/", Path(scratch) / name, origin.members)
        move_into_place(Path(scratch) / name, target)
    archive.unlink()
    return target


def fetch(remote: Remote, folder: Path, waits: tuple[float, ...] = WAITS) -> Path:
    """``remote`` as a file in ``folder``, verified.

    Raises ``RuntimeError`` naming what failed, and the folder to put the file in by hand.
    """
    path = folder / remote.name
    if path.is_file():  # from an earlier call, or put here by hand
        if remote.sha256 and (problem := _mismatch(remote, path)):
            raise RuntimeError(f"{path}: {problem}. Remedy: delete it, and start again")
        return path
    folder.mkdir(parents=True, exist_ok=True)
    by_hand = f"Remedy: check the network, or fetch {remote.url} by hand, put it in {folder} as {path.name}, and start again."
    part = path.with_name(path.name + ".part")
    for attempt, wait in enumerate((*waits, None), 1):
        try:
            _continue(remote.url, part)
            break
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 429) or wait is None:
                raise RuntimeError(
                    f"could not fetch {remote.url}: HTTP {error.code} {error.reason}. {by_hand}"
                ) from None
        except (OSError, http.client.HTTPException) as error:
            if wait is None:
                reason = getattr(error, "reason", None) or error
                raise RuntimeError(
                    f"could not fetch {remote.url} in {attempt} tries: {reason}. {by_hand}"
                ) from None
        time.sleep(wait)
    if problem := _mismatch(remote, part):
        part.unlink()
        _tag(part).unlink(missing_ok=True)
        raise RuntimeError(f"{remote.url}: {problem}. What was fetched has been deleted. {by_hand}")
    part.replace(path)
    _tag(part).unlink(missing_ok=True)
    return path


def _continue(url: str, part: Path) -> None:
    """Fetch what ``part`` still lacks. Raises ``OSError`` or ``HTTPException`` if the connection fails or the file stays incomplete."""
    have = part.stat().st_size if part.is_file() else 0
    tag = _tag(part).read_text(encoding="utf-8") if have and _tag(part).is_file() else ""
    headers = {"Range": f"bytes={have}-", "If-Range": tag} if tag else {}
    try:
        answer = urllib.request.urlopen(
            urllib.request.Request(url, headers=_AGENT | headers), timeout=TIMEOUT
        )
    except urllib.error.HTTPError as error:
        if (
            error.code == 416
        ):  # nothing lies beyond what is here: whole already, or longer than the file at the origin
            size = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
            if size and int(size[1]) == have:
                return
            part.unlink()
            raise ConnectionError("the file at the origin has changed its size") from None
        raise
    with answer:
        goes_on = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(
            f"bytes {have}-"
        )
        if answer.status == 206 and not goes_on:
            part.unlink()
            raise ConnectionError("the server sent another part of the file than asked for")
        length = answer.headers.get("Content-Length")
        have = have if goes_on else 0
        if not goes_on:
            write_atomic(_tag(part), _strong_tag(answer.headers))
        with open(part, "ab" if goes_on else "wb") as out:
            total = None if length is None else -(-int(length) // PIECE)
            for piece in track(_pieces(answer), f"fetching {part.stem} (MB)", total):
                out.write(piece)
    if length is not None and part.stat().st_size != have + int(length):
        raise ConnectionError(
            f"the connection was cut after {part.stat().st_size:,} of {have + int(length):,} bytes"
        )


def _pieces(answer: BinaryIO) -> Iterator[bytes]:
    while piece := answer.read(PIECE):
        yield piece


def _tag(part: Path) -> Path:
    return part.with_name(part.name + ".etag")


def _strong_tag(headers: http.client.HTTPMessage) -> str:
    """What ``If-Range`` may be given: a strong ETag, else the date of the last change, else nothing (then a download starts anew)."""
    tag = headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else headers.get("Last-Modified", "")


def _mismatch(remote: Remote, path: Path) -> str:
    """What is wrong with the content of ``path``; "" if nothing is, or nothing is known to compare it with."""
    if remote.sha256:
        found, expected, kind = sha256_file(path), remote.sha256, "sha256"
    elif remote.md5_url:
        with tempfile.TemporaryDirectory() as scratch:
            stated = fetch(Remote(remote.md5_url), Path(scratch)).read_text(
                encoding="utf-8", errors="replace"
            )
        with open(path, "rb") as file:
            found, kind = hashlib.file_digest(file, "md5").hexdigest(), "md5"
        stated = re.search(r"\b[0-9a-f]{32}\b", stated.lower())
        if stated is None:
            return f"the origin's checksum file {remote.md5_url} states no md5"
        expected = stated[0]
    else:
        return ""
    return "" if found == expected else f"{kind} is {found}, expected {expected}"
