"""Is this machine fit for the study? One row per check, each with the remedy if it fails."""

import os
import platform
import re
import shutil
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import psutil
import torch
import yaml

from recrl_lib import paths, provenance, runs

OK, WARN, FAIL = "OK", "WARN", "FAIL"
GIB = 2**30
TORCH_RANGE = ((2, 11), (2, 13))  # minor versions on which the code is known to run


class Check(NamedTuple):
    """``ok`` is "OK", "WARN" (the study runs, with a reservation) or "FAIL"; ``remedy`` is empty for OK."""

    check: str
    found: str
    needed: str
    ok: str
    remedy: str = ""


def _check(
    name: str, found: str, needed: str, good: bool, remedy: str, otherwise: str = FAIL
) -> Check:
    return (
        Check(name, found, needed, OK, "")
        if good
        else Check(name, found, needed, otherwise, remedy)
    )


def check_environment(device: str = "auto") -> pd.DataFrame:
    """All checks as a table with columns check, found, needed, ok, remedy. Raises nothing for a bad machine."""
    rows = [
        check_python(),
        *check_packages(),
        check_cpus(),
        *check_memory(),
        *check_disk(),
        check_gpus(),
        check_git(),
    ]
    return pd.DataFrame([*rows, check_matmul(device)], columns=Check._fields)


def check_python() -> Check:
    version = platform.python_version_tuple()
    good = tuple(map(int, version[:2])) >= (3, 11)
    return _check(
        "python",
        platform.python_version(),
        ">= 3.11",
        good,
        "make env PYTHON=<a newer interpreter>",
    )


def pinned_packages(path: Path | None = None) -> dict[str, str | None]:
    """``{package: version}`` from the pip section of ``environment.yml``; ``None`` where any version will do."""
    content = yaml.safe_load((path or paths.ROOT / "environment.yml").read_text(encoding="utf-8"))
    (section,) = (entry["pip"] for entry in content["dependencies"] if isinstance(entry, dict))
    pins = (line.partition("==") for line in section if not line.startswith("-"))
    return {name: version or None for name, _, version in pins}


def check_packages(pins: dict[str, str | None] | None = None) -> list[Check]:
    """A row for each package that is missing or not the pinned version, and one row for all the others."""
    pins = pinned_packages() if pins is None else pins
    rows = [_check_package(name, pin) for name, pin in pins.items()]
    bad = [row for row in rows if row.ok != OK]
    summary = Check(
        "packages", f"{len(rows) - len(bad)} of {len(rows)} as pinned", "environment.yml", OK
    )
    return [summary, *bad]


def _check_package(name: str, pin: str | None) -> Check:
    found = provenance.package_version(name)
    if found is None:
        return Check(name, "missing", pin or "any version", FAIL, "make env")
    public = found.partition("+")[0]  # 2.13.0+cpu is 2.13.0
    if name == "torch":
        low, high = TORCH_RANGE
        minor = tuple(int(part) for part in re.findall(r"\d+", public)[:2])
        span = f"{low[0]}.{low[1]} to {high[0]}.{high[1]}"
        return _check(
            name, found, span, low <= minor <= high, "make env, or an image with such a version"
        )
    return _check(
        name,
        found,
        pin or "any version",
        pin in (None, public),
        "make env (numbers may differ)",
        WARN,
    )


def check_cpus() -> Check:
    usable = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return _check(
        "CPU cores", str(usable), ">= 2", usable >= 2, "expect about twice the stated times", WARN
    )


def check_memory() -> list[Check]:
    """Total and free memory; a container's limit counts as the total."""
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()).isdigit() and int(text) < total:
        used = int((limit.parent / "memory.current").read_text())
        total, free = int(text), min(free, int(text) - used)
    return [
        _check(
            "memory, total",
            f"{total / GIB:.1f} GiB",
            ">= 7 GiB",
            total >= 7 * GIB,
            "use the smoke profile only",
            WARN,
        ),
        _check(
            "memory, free",
            f"{free / GIB:.1f} GiB",
            ">= 4 GiB",
            free >= 4 * GIB,
            "close other programs",
            WARN,
        ),
    ]


def check_disk() -> list[Check]:
    folders = {
        "disk, cache": (paths.cache_dir(), "set RECRL_HOME to a larger disk"),
        "disk, runs": (paths.ROOT, "free space there"),
    }
    rows = []
    for name, (folder, remedy) in folders.items():
        free = shutil.disk_usage(folder).free
        rows.append(_check(name, f"{free / GIB:.0f} GiB free", ">= 2 GiB", free >= 2 * GIB, remedy))
    return rows


def check_gpus() -> Check:
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    found = "; ".join(f"{p.name}, {p.total_memory / GIB:.0f} GiB" for p in properties)
    return Check("GPU", found or "none (CPU)", "optional", OK)


def check_git() -> Check:
    try:
        done = subprocess.run(["git", "--version"], capture_output=True, text=True, timeout=30)
        found = done.stdout.strip().removeprefix("git version ")
    except (OSError, subprocess.TimeoutExpired):
        found = ""
    return _check(
        "git",
        found or "missing",
        "any version",
        bool(found),
        "install git: manifests will lack the commit",
        WARN,
    )


def check_matmul(device: str = "auto", size: int = 1024, tolerance: float = 1e-4) -> Check:
    """A float32 product on ``device`` against float64 on the CPU: relative Frobenius error, and speed."""
    name, needed = "matmul", f"relative error <= {tolerance:g}"
    try:
        where = runs.resolve_device(device)
        generator = torch.Generator().manual_seed(0)
        a, b = (torch.randn(size, size, generator=generator) for _ in range(2))
        error, rate = _matmul_error(a, b, where), _matmul_rate(a.to(where), b.to(where))
    except (
        RuntimeError
    ) as problem:  # no such device, out of memory, a driver that does not fit torch
        return Check(
            name,
            str(problem).splitlines()[0],
            needed,
            FAIL,
            "device='cpu', or repair the CUDA driver",
        )
    found = f"{error:.1e} on {where.type}, {rate:.0f} GFLOP/s"
    return _check(name, found, needed, error <= tolerance, "device='cpu', and have the GPU checked")


def _matmul_error(a: torch.Tensor, b: torch.Tensor, device: torch.device) -> float:
    exact = a.double() @ b.double()
    return float((a.to(device) @ b.to(device)).cpu().double().sub(exact).norm() / exact.norm())


def _matmul_rate(a: torch.Tensor, b: torch.Tensor, repeats: int = 5) -> float:
    """GFLOP/s of ``a @ b``, both (n, n): 2 n^3 operations each, the fastest of ``repeats``."""
    seconds = []
    for _ in range(repeats):
        begun = time.perf_counter()
        (a @ b).sum().item()  # item() waits for the device
        seconds.append(time.perf_counter() - begun)
    return 2 * a.shape[0] ** 3 / min(seconds) / 1e9
