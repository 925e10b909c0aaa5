"""Conversations: are follow-up questions answered truly?

After the first explanation each user asks two follow-ups in turn, in wordings and with a kind of
property that tuning never saw. All arms of one seed meet the same questions; earlier answers in the
chat are the arm's own.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from recrl_lib.evaluation import stats
from recrl_lib.explainer.prompts import Record
from recrl_lib.explainer.sampling import Explained
from recrl_lib.scoring import answers, intents
from recrl_lib.scoring.composed import composed_line
from recrl_lib.scoring.reward import Reward
from recrl_lib.study import Study

MEASURES = [
    "answered_truly", "well_formed", "invented", "wrong_places", "wrong_properties", "kl",
]  # fmt: skip


def converse(
    study: Study,
    records: Sequence[Record],
    texts: Sequence[str],
    say: Callable[[list[dict], int], Explained],
    seed: int,
) -> pd.DataFrame:
    """One row an answer to both follow-ups after the first answers ``texts``, with ``MEASURES``.

    ``say`` answers records of a turn, as ``sampling.explain`` does.
    """
    parts, form = [], Reward("faithful", study.catalogue)
    for turn in (2, 3):
        rng = np.random.default_rng([seed, turn])
        kinds = [intents.FOLLOW_UPS[(i + turn) % 3] for i in range(len(records))]
        pairs = zip(records, texts, kinds, strict=True)
        records = [study.follow_up(r, text, kind, rng, True) for r, text, kind in pairs]
        said = say(records, turn)
        texts = said.texts
        held = [answers.judge(r, text, study.catalogue) for r, text in zip(records, texts)]
        rows = [(a.truly, well, *a[1:]) for a, well in zip(held, form(records, texts)[1]["form"])]
        asked = pd.DataFrame(records)[["user", "item", "intent", "question"]]
        asked[MEASURES[:-1]] = np.array(rows, np.float64)
        parts.append(asked.assign(turn=turn, text=texts, kl=said.kl))
    return pd.concat(parts, ignore_index=True)


def composed(records: list[dict], turn: int) -> Explained:
    """The composed answers, as ``sampling.explain`` gives those of a policy."""
    n = len(records)
    return Explained(list(map(composed_line, records)), [], np.zeros(n), np.ones(n, bool))


def rows(table: pd.DataFrame, resamples: int, rng: np.random.Generator) -> pd.DataFrame:
    """Results of conversations: means an answer by arm, and differences to base and to the arm's
    warm start, of all follow-ups, each intent and each turn. Users are resampled, with both turns.
    """
    groups = {"follow_ups": table["turn"] > 0}
    groups |= {f"intent:{kind}": table["intent"] == kind for kind in intents.FOLLOW_UPS}
    groups |= {f"turn:{turn}": table["turn"] == turn for turn in (2, 3)}
    arms, out = list(table["arm"].unique()), []
    for group, chosen in groups.items():
        by_user = table[chosen].groupby(["arm", "user"], sort=False)[MEASURES].sum()
        counts = table[chosen].groupby(["arm", "user"], sort=False).size()
        for arm, against in [(a, b) for a in arms for b in ("", "base", f"{a}_warm")]:
            if against and (against not in arms or against == arm):
                continue
            values = by_user.loc[arm] - (by_user.loc[against] if against else 0.0)
            told = np.broadcast_to(counts.loc[arm], values.shape[::-1])
            found = stats.bootstrap(values.to_numpy().T, told, resamples, rng)
            key = {"arm": arm, "against": against, "group": group, "measure": MEASURES}
            out.append(pd.DataFrame(key | found._asdict() | {"n": len(values)}))
    return pd.concat(out, ignore_index=True)
