"""Progress of long loops: a tqdm bar for people, nothing in stored notebooks."""

import os
from collections.abc import Iterable, Iterator

EVERY = 0.5  # seconds between two updates


def track(items: Iterable, desc: str, total: int | None = None) -> Iterator:
    """Yield from ``items`` and report how many are done, as ``RECRL_PROGRESS`` says.

    Unset: a tqdm bar. ``off``: silence. A path: texts such as ``ppo 4/12`` appended to it, which
    ``execute`` shows live from inside a papermill cell, where a bar would be stored.
    """
    from tqdm import auto, std

    sink = os.environ.get("RECRL_PROGRESS", "")
    if sink in ("", "off"):
        hidden = sink == "off"
        yield from auto.tqdm(items, desc, total, mininterval=EVERY, leave=False, disable=hidden)
    else:
        form = {"bar_format": "{desc} {n_fmt}/{total_fmt}", "position": 0}
        with open(sink, "a", encoding="utf-8", buffering=1) as out:
            yield from std.tqdm(items, desc, total, file=out, mininterval=EVERY, **form)
