"""Progress of long loops: a bar for people, nothing in stored notebooks.

``RECRL_PROGRESS`` decides: unset, a tqdm bar; ``off``, silence (nbval); a path, one JSON line per
update appended there, which the runner reads to show live progress from inside a papermill cell
(a bar inside papermill would be stored in the executed notebook instead).
"""

import json
import os
import time
from collections.abc import Iterable, Iterator


def track(items: Iterable, desc: str, total: int | None = None, every: float = 0.5) -> Iterator:
    """Yield from ``items`` and report how many are done, at most once per ``every`` seconds."""
    if total is None:
        total = len(items) if hasattr(items, "__len__") else None
    sink = os.environ.get("RECRL_PROGRESS", "")
    if sink == "off":
        yield from items
    elif sink:
        yield from _to_file(items, desc, total, every, sink)
    else:
        from tqdm.auto import tqdm

        yield from tqdm(items, desc=desc, total=total, mininterval=every, leave=False)


def _to_file(items, desc, total, every, sink):
    last = 0.0
    done = 0
    with open(sink, "a", encoding="utf-8", buffering=1) as out:
        for done, item in enumerate(items, 1):
            yield item
            now = time.monotonic()
            if now - last >= every or done == total:
                out.write(json.dumps({"desc": desc, "done": done, "total": total}) + "\n")
                last = now
