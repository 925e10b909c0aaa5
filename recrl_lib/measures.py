"""The table of results that a stage writes, ``metrics/<stage>.csv``: one row a number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from recrl_lib import paths
from recrl_lib.params import stage_named
from recrl_lib.provenance import display

if TYPE_CHECKING:
    import pandas as pd

ARMS = ("base", "separate", "unshielded", "shielded")
# Measures that a stage's results must hold: other tools rely on them. A stage may write more.
REQUIRED_MEASURES = {
    "data": "n_users n_items n_interactions".split(),
    "ranker": "ndcg@10 hr@10 mrr@10 valid_ndcg@10 train_seconds text_free_ndcg@10".split(),
    "explainer": "trainable_parameters total_parameters".split(),
    "shield": "rank_mean energy overlap leak_before leak_after".split(),
    "shielded_ppo": (
        "steps episodes reward_first reward_last kl_last ratio_first_minibatch_max_dev "
        "shield_seconds step_seconds peak_memory_gb"
    ).split(),
    "evaluation": (
        "reward faithfulness faithfulness_served rank_drop specificity grounding_precision "
        "grounding_recall ctr ctr_lift kl ndcg@10 hr@10 top10_overlap "
        "top10_set_same top10_exact kendall_tau rbo max_abs_score_delta distinct_2 tokens "
        "answered_truly finished"
    ).split(),
    "audit": (
        "toxicity_mean toxicity_p95 gini_base gini_after parity_gap privacy_leak_rate"
    ).split(),
}
# Arms that must have each of them, unless it is about the stage as a whole.
REQUIRED_ARMS = {"shielded_ppo": ARMS[2:], "evaluation": ARMS}
NanIsEmpty = BeforeValidator(lambda given: None if given is None or given != given else given)
Number = Annotated[float | None, NanIsEmpty]
Count = Annotated[int | None, NanIsEmpty]


class Result(BaseModel):
    """One row of the table: one number."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    arm: str = ""  # arm, method or setting; empty for the stage as a whole
    against: str = ""  # the arm that the value is a paired difference to
    group: str = "all"  # users or items it covers, such as new_items
    measure: str  # what was measured, such as ndcg@10
    value: float  # finite; yes and no are 1 and 0
    low: Number = None  # bounds of the 95 % interval
    high: Number = None
    n: Count = None  # users behind the value
    seeds: Count = None  # trainings behind the value
    passed: Count = None  # audit only: 1 within the limit, 0 outside

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What tells one result from another."""
        return self.arm, self.against, self.group, self.measure


KEY = ("arm", "against", "group", "measure")
COLUMNS = [name for name in Result.model_fields if name != "passed"]


def parsed(given: Mapping[str, Any]) -> Result:
    """A row from a mapping of column names to values. ``ValueError`` names row and column."""
    try:
        return Result(**given)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"result {dict(given)}: {first['loc'][0]}: {first['msg']}") from None


def missing(stage: str, rows: Iterable[Result]) -> list[str]:
    """Measures that ``stage`` must write and that ``rows`` lack."""
    present, lacking = {(row.measure, row.arm) for row in rows}, []
    for name in REQUIRED_MEASURES.get(stage, ()):
        arms = {arm for measure, arm in present if measure == name}
        without = [arm for arm in REQUIRED_ARMS.get(stage, ()) if not arms & {arm, ""}]
        lacking += [f"{name} of {arm}" for arm in without] if arms else [name]
    return lacking


def as_csv(rows: Iterable[Result], audit: bool = False) -> str:
    """The table as text. Floats are written by ``repr`` (whole ones as integers): exactly."""
    import pandas as pd

    columns = [*COLUMNS, "passed"] if audit else COLUMNS
    cells = [[getattr(row, name) for name in columns] for row in rows]
    cells = [[int(x) if isinstance(x, float) and x == x // 1 else x for x in row] for row in cells]
    table = pd.DataFrame(cells, columns=columns, dtype=object)
    return table.to_csv(index=False, lineterminator="\n")


def read_results(run: str, stage: str) -> pd.DataFrame:
    """The table of results that a stage wrote. ``RuntimeError`` if it is missing or too old.

    Text (``""`` where empty), then floats (NaN where empty); ``passed`` for the audit only.
    """
    import pandas as pd

    path = paths.RUNS / run / "metrics" / f"{stage}.csv"
    remedy = f"run notebooks/{stage_named(stage).notebook} with run={run!r}"
    if not path.is_file():
        raise RuntimeError(f"{display(path)} is missing: {remedy}, or correct the run's name")
    table = pd.read_csv(path, dtype=str, keep_default_na=False)
    if lacking := [name for name in COLUMNS if name not in table]:
        raise RuntimeError(f"{display(path)} lacks {', '.join(lacking)}: {remedy} again")
    numbers = [name for name in table if name not in KEY]
    return table.assign(**{name: [float(x or "nan") for x in table[name]] for name in numbers})


def value(
    table: pd.DataFrame, measure: str, arm: str = "", against: str = "", group: str = "all"
) -> float:
    """The value with this key in a table of results. ``ValueError`` unless there is exactly one."""
    key = dict(zip(KEY, (arm, against, group, measure)))
    found = table.loc[(table[list(KEY)] == list(key.values())).all(axis=1), "value"]
    if len(found) != 1:
        raise ValueError(f"{key}: {len(found)} results have this key, one is needed")
    return float(found.iloc[0])
