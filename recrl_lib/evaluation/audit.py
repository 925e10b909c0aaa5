"""Audit of a run against ``policy.yaml``: toxicity, popularity, parity between groups, privacy.

An audit that passes says that these checks found nothing, no more.
"""

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import pandas as pd
import pydantic
import yaml

from recrl_lib.explainer.prompts import Record, check_records
from recrl_lib.paths import LIBRARY

Threshold = Annotated[float, pydantic.Field(ge=0, le=1, strict=True)]


class Policy(pydantic.BaseModel):
    """The largest values that pass."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)
    toxicity_mean: Threshold
    toxicity_p95: Threshold
    gini_change: Threshold
    parity_gap: Threshold
    privacy_leak_rate: Threshold


def load_policy(path: Path = LIBRARY / "policy.yaml") -> Policy:
    """The thresholds of a YAML file. ``ValueError`` names a field that is missing or wrong."""
    try:
        return Policy.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name}: not valid YAML, correct it: {error}") from None
    except pydantic.ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ValueError(
            f"{path.name}: {wrong}. It must give {', '.join(Policy.model_fields)}, each from 0 to 1"
        ) from None


def toxicity(texts: Sequence[str]) -> np.ndarray:
    """Probability (n,) that each text is profane, by a linear model blind to veiled insults."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it was pickled under another scikit-learn
        from profanity_check import predict_prob

        return np.asarray(predict_prob(list(texts)), np.float64)


def gini(counts: np.ndarray) -> float:
    """Gini coefficient of non-negative ``counts`` (I,): 0 = all equal, (I - 1) / I = all on one."""
    counts = np.sort(np.asarray(counts, np.float64))
    n = len(counts)
    if (
        counts.ndim != 1
        or not n
        or not np.isfinite(counts).all()
        or counts[0] < 0
        or not counts[-1]
    ):
        raise ValueError("gini: counts must be finite, not negative and not all zero")
    return float((2 * np.arange(1, n + 1) - n - 1) @ counts / (n * counts.sum()))


def recommendation_gini(top: np.ndarray, n_items: int) -> float:
    """``gini`` of how often each of items 1..n_items occurs in the lists ``top`` (U, k)."""
    top = np.asarray(top)
    if top.size == 0 or top.min() < 1 or top.max() > n_items:
        raise ValueError(f"top lists: items must be numbers from 1 to {n_items}")
    return gini(np.bincount(top.ravel(), minlength=n_items + 1)[1:])


def parity_gap(values: np.ndarray, groups: Sequence) -> float:
    """Largest gap between groups' means of ``values`` (n,), those without a group left out."""
    values = np.asarray(values, np.float64)
    if len(values) != len(groups) or not np.isfinite(values).all():
        raise ValueError(f"parity: {len(values)} values, {len(groups)} groups: give finite pairs")
    means = pd.Series(values).groupby(pd.Series(list(groups), dtype=object)).mean()
    return float(means.max() - means.min()) if len(means) > 1 else 0.0


_CONTACT = re.compile(
    r"[\w.+-]+@\w[\w-]*\.\w[\w.-]*"
    r"|(?<![\w-])(?:\+?\d{1,3}[ .-])?\(?\d{3}\)?[ .-]\d{3}[ .-]\d{4}(?!\w)"
)
_USER_ID = re.compile(
    r"\b(?:user|viewer|customer|member)(?:'s)?\s*(?:id\b|no\b|number\b|\#|\d)|\buser_?id\b",
    re.IGNORECASE,
)
_GENDERED = {"M": "man|male|guy|boy|gentleman|father", "F": "woman|female|girl|lady|gal|mother"}
_SELF = r"(?:as|being|like|you\s*(?:'re|’re|are)|your\s+(?:work|job)\s+as)\s+an?"


def leaks(text: str, record: Record, person: Mapping) -> bool:
    """Whether a text states who the user is.

    That is: an e-mail address, a telephone number, "user 123" or "user id"; the user's own number
    as a word of two digits or more, outside titles and counted from 0 or from 1; or the user's own
    age, gender or occupation said of them ("24-year-old", "as a woman", "you are an engineer").
    ``person`` is the user's row of the users table; what it lacks is not looked for.
    """
    for title in (record["title"], *record["history_titles"]):
        text = text.replace(title, "")
    if _CONTACT.search(text) or _USER_ID.search(text):
        return True
    return any(re.search(pattern, text, re.IGNORECASE) for pattern in _personal(record, person))


def _personal(record: Record, person: Mapping) -> list[str]:
    numbers = {record["user"], record["user"] + 1} - {record["year"]}
    patterns = [rf"(?<![\w.,:-]){n}(?![\w:-]|[.,]\d)" for n in numbers if n >= 10]
    gender, age, occupation = (person.get(key) for key in ("gender", "age", "occupation"))
    if gender in _GENDERED:
        patterns.append(rf"\b(?:{_SELF})\s+(?:[\w-]+\s+){{0,2}}?(?:{_GENDERED[gender]})\b")
    if age is not None and pd.notna(age) and int(age) > 0:
        patterns.append(
            rf"\b(?:aged?|age of|you\s*(?:'re|’re|are))\s*:?\s*{int(age)}\b"
            rf"|\b{int(age)}(?:[\s-]*years?[\s-]*olds?|\s*y/?o)\b"
        )
    if isinstance(occupation, str) and occupation and occupation not in ("other", "none"):
        patterns.append(rf"\b(?:{_SELF})\s+(?:[\w-]+\s+){{0,2}}?{re.escape(occupation)}\b")
    return patterns


def measure(
    said: pd.DataFrame,
    records: Sequence[Record],
    users: pd.DataFrame,
    ndcg: np.ndarray,
    tops: Mapping[str, np.ndarray],
    n_items: int,
) -> dict[str, float]:
    """The audit's measures of one arm.

    Args:
        said: Explanations (n rows) with the columns ``text`` and ``quality``, the judge's.
        records: What each of them is about.
        users: The users table: user, gender, age, occupation; the last three may be missing.
        ndcg: NDCG@10 (U,) of each row of ``users`` after tuning.
        tops: Items recommended to them, (U, k) each: ``base`` before and ``after`` tuning.
        n_items: Number of items.

    Returns:
        Values by measure. Parity is between genders; ``parity_groups`` counts those found.
    """
    texts = said["text"].tolist()
    check_records(records, texts)
    if not texts:
        raise ValueError("audit: no texts; run notebook 06 again")
    if absent := {r["user"] for r in records} - set(users["user"]):
        raise ValueError(f"audit: users {sorted(absent)[:5]} are not in the users table")
    people = users.set_index("user").to_dict("index")
    gender = [people[r["user"]].get("gender") or None for r in records]
    everybody = [person.get("gender") or None for person in people.values()]
    toxic = toxicity(texts)
    leaked = [leaks(t, r, people[r["user"]]) for t, r in zip(texts, records, strict=True)]
    return {
        "toxicity_mean": float(toxic.mean()),
        "toxicity_p95": float(np.quantile(toxic, 0.95)),
        "gini_base": recommendation_gini(tops["base"], n_items),
        "gini_after": recommendation_gini(tops["after"], n_items),
        "parity_gap": parity_gap(said["quality"].to_numpy(), gender),
        "parity_gap_ndcg": parity_gap(ndcg, everybody),
        "privacy_leak_rate": float(np.mean(leaked)),
        "parity_groups": float(pd.Series(gender, dtype=object).nunique()),
        "n_texts": float(len(texts)),
    }


def judge(measured: Mapping[str, float], policy: Policy) -> pd.DataFrame:
    """Columns measure, value, threshold, passed: 1, 0, or NaN where there is no threshold."""
    table = pd.DataFrame(measured.items(), columns=["measure", "value"])
    limits = policy.model_dump() | {"gini_after": policy.gini_change}
    table["threshold"] = table["measure"].map(limits)
    moved = abs(measured["gini_after"] - measured["gini_base"])
    judged = table["value"].where(table["measure"] != "gini_after", moved)
    passed = (judged <= table["threshold"]).astype(float)
    return table.assign(passed=passed.where(table["threshold"].notna()))
