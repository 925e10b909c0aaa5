"""How much memory this process has held."""

import sys
from pathlib import Path

import psutil


def peak_rss() -> int:
    """Most resident memory of this program so far, in bytes.

    On Linux the kernel's mark for the program itself (VmHWM): ``ru_maxrss`` starts, through fork and exec, from the size of the
    process that started this one, so that a child of a large parent seems as large.
    """
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.is_file() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # Windows has none

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others kilobytes
