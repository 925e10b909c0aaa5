"""Progress of long loops: a tqdm bar for people, nothing in stored notebooks."""

import os
import time
from collections.abc import Iterable, Iterator
from operator import length_hint

EVERY = 0.5  # seconds between two updates


def track(items: Iterable, desc: str, total: int | None = None) -> Iterator:
    """Yield from ``items`` and report how many are done, as ``RECRL_PROGRESS`` says.

    Unset: a tqdm bar. ``off``: silence. A path: lines such as ``ppo 4/12`` appended to it, which
    ``execute`` shows live from inside a papermill cell, where a bar would be stored.
    """
    sink = os.environ.get("RECRL_PROGRESS", "")
    if sink == "off":
        yield from items
    elif sink:
        yield from _to_file(items, desc, total or length_hint(items) or None, sink)
    else:
        from tqdm.auto import tqdm

        yield from tqdm(items, desc=desc, total=total, mininterval=EVERY, leave=False)


def _to_file(items: Iterable, desc: str, total: int | None, sink: str) -> Iterator:
    last = 0.0
    with open(sink, "a", encoding="utf-8", buffering=1) as out:
        for done, item in enumerate(items, 1):
            yield item
            if time.monotonic() - last >= EVERY or done == total:
                out.write(f"{desc} {done}" + (f"/{total}" if total else "") + "\n")
                last = time.monotonic()
