"""Is this machine fit for the study? One line a check, each with the remedy if it fails."""

import os
import platform
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
import yaml

from recrl_lib import paths
from recrl_lib.provenance import package_version
from recrl_lib.runs import resolve_device

OK, WARN, FAIL = "OK", "WARN", "FAIL"
GIB = 2**30
TORCH = ((2, 11), (2, 13))  # minor versions on which the code is known to run


class Check(NamedTuple):
    """What was found; ``status`` is OK, WARN (the study runs, with a reservation) or FAIL."""

    name: str
    found: str
    status: str = OK
    remedy: str = ""

    def __str__(self) -> str:
        text = f"[{self.status}] {self.name}: {self.found}"
        return text if self.status == OK else f"{text}; {self.remedy}"


def _check(name: str, found: str, good: bool, remedy: str, otherwise: str = FAIL) -> Check:
    return Check(name, found) if good else Check(name, found, otherwise, remedy)


def check_environment(device: str = "auto") -> list[Check]:
    """All checks; raises nothing for a bad machine."""
    memory, version = psutil.virtual_memory(), platform.python_version_tuple()
    limit = Path("/sys/fs/cgroup/memory.max")  # a container's limit counts as its memory
    text = limit.read_text().strip() if limit.is_file() else ""
    total = min(memory.total, int(text) if text.isdigit() else memory.total) / GIB
    linux, free = hasattr(os, "sched_getaffinity"), memory.available / GIB
    cores = len(os.sched_getaffinity(0)) if linux else os.cpu_count() or 1
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    named = "; ".join(f"{p.name}, {p.total_memory / GIB:.0f} GiB" for p in gpus)
    new, git = tuple(map(int, version[:2])) >= (3, 11), bool(shutil.which("git"))
    without = "install it: manifests will lack the commit"
    cache, runs = (shutil.disk_usage(f).free / GIB for f in (paths.cache_dir(), paths.ROOT))
    larger = "free 2 GiB there, or set RECRL_HOME to a larger disk"
    return [
        _check("python", ".".join(version), new, "make env PYTHON=<3.11 or newer>"),
        *check_packages(pinned_packages()),
        _check("CPU cores", f"{cores}", cores >= 2, "expect about twice the stated times", WARN),
        _check("memory", f"{total:.1f} GiB", total >= 7, "use the smoke profile only", WARN),
        _check("free memory", f"{free:.1f} GiB", free >= 4, "close other programs", WARN),
        _check("disk of the cache", f"{cache:.0f} GiB free", cache >= 2, larger),
        _check("disk of the runs", f"{runs:.0f} GiB free", runs >= 2, "free 2 GiB there"),
        Check("GPU", named or "none, models run on the CPU"),
        _check("git", "found" if git else "missing", git, without, WARN),
        check_matmul(device),
    ]


def pinned_packages() -> dict[str, str]:
    """``{package: version}`` of the pip section of ``environment.yml``; empty: any version."""
    content = yaml.safe_load((paths.ROOT / "environment.yml").read_text(encoding="utf-8"))
    (section,) = (entry["pip"] for entry in content["dependencies"] if isinstance(entry, dict))
    pins = (line.partition("==") for line in section if not line.startswith("-"))
    return {name: version for name, _, version in pins}


def check_packages(pins: dict[str, str]) -> list[Check]:
    """A line for each package that is missing or not as pinned, and one for all the others."""
    bad = []
    span = "make env, or an image with torch {}.{} to {}.{}".format(*sum(TORCH, ()))
    for name, pin in pins.items():
        found = package_version(name)
        public = (found or "").partition("+")[0]  # 2.13.0+cpu is 2.13.0
        minor = tuple(int(part) for part in re.findall(r"\d+", public)[:2])
        if found is None:
            bad.append(Check(name, "missing", FAIL, "make env"))
        elif name == "torch" and not TORCH[0] <= minor <= TORCH[1]:
            bad.append(Check(name, found, FAIL, span))
        elif name != "torch" and pin not in ("", public):
            remedy = f"{pin} is pinned: make env (numbers may differ)"
            bad.append(Check(name, found, WARN, remedy))
    return [Check("packages", f"{len(pins) - len(bad)} of {len(pins)} as pinned"), *bad]


def check_matmul(device: str = "auto", size: int = 1024, tolerance: float = 1e-4) -> Check:
    """Relative error of a float32 product on ``device`` against float64 on the CPU."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator) for _ in range(2))
    exact = a.double() @ b.double()
    try:
        where = resolve_device(device)
        error = float(((a.to(where) @ b.to(where)).cpu() - exact).norm() / exact.norm())
    except RuntimeError as problem:  # no such device, out of memory, a driver that does not fit
        remedy = "device='cpu', or repair the CUDA driver"
        return Check("matmul", str(problem).splitlines()[0], FAIL, remedy)
    found = f"relative error {error:.1e} on {where.type}"
    return _check("matmul", found, error <= tolerance, "device='cpu', and have the GPU checked")


def peak_rss() -> int:
    """Most resident memory of this program so far, in bytes."""
    status = Path("/proc/self/status")  # Linux: ru_maxrss would count the parent's size as well
    if status.is_file() and (found := re.search(r"VmHWM:\s+(\d+)", status.read_text())):
        return int(found[1]) * 1024
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # Windows has none

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS
