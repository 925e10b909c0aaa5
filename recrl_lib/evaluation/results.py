"""Arms side by side: what tuning did to the ranking, to the explanations, and to simulated clicks.

All arms explain the same items to the same users with the same random numbers, and the click model
scores items with the *base* ranker, so that a lift can come from the words alone.

Rows of results are means of a measure per ``arm`` or paired differences to the arm in ``against``
(for ``ctr_lift`` the ratio of clicks). ``separate`` speaks with the unshielded policy. Groups:
``new_items`` and ``seen_items`` (films that PPO explained to none, or others), ``control_users``
(those with scored controls), ``shuffled`` (permuted texts), ``profile:<name>``.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from recrl_lib.evaluation import rank_drop, stats
from recrl_lib.evaluation.clicks import ClickModel, standardised_score
from recrl_lib.explainer.model import Explainer
from recrl_lib.explainer.prompts import Record, messages, prompt_ids
from recrl_lib.explainer.sampling import explain, given, token_logprobs
from recrl_lib.params import PROFILES, Params, resolve
from recrl_lib.progress import track
from recrl_lib.ranker.ranking import mask_seen, score_chunks
from recrl_lib.scoring import attribution, composed, judge
from recrl_lib.study import Study

TEXT_ARMS = ("base", "unshielded", "shielded")
CONTROL, RULE = "control_", "rule_"  # arms of texts composed by rule: must not win, and rivals
CEILING = "rule_oracle"
HEADLINE = ("reward", "faithfulness", "rank_drop", "quality", "ctr")
# Of a text: faithfulness whatever its form, to the base ranking, to the one that its arm would
# serve, and of the texts that cite at all; the judge's measure of it.
FAITHFUL = ("faithfulness", "faithfulness_served", "faithfulness_cited", "cites", "rank_drop")
# Columns of the ranking table, and the measures that their means are.
RANKING = {
    "ndcg": "ndcg@10", "hr": "hr@10", "overlap": "top10_overlap", "set_same": "top10_set_same",
    "exact": "top10_exact", "kendall_tau": "kendall_tau", "rbo": "rbo", "top1_same": "top1_same",
}  # fmt: skip


class Scorer:
    """Scores texts on ``records``, or on the first few of them, the same way for every arm.

    ``reward(records, texts)`` is (total (n,), parts), as ``scoring.reward.Reward`` gives it;
    ``encoder`` as ``judge.SentenceEncoder``; ``seed`` of the texts and of the judge's candidates.
    """

    def __init__(
        self, study: Study, records: Sequence[Record], reward: Callable, encoder, seed: int
    ):
        lists, n = study.whole_lists([r["user"] for r in records]), len(records)
        same_user = [
            [record, *(other for other in lists[row::n] if other["item"] != record["item"])]
            for row, record in enumerate(records)
        ]
        self.study, self.records, self.reward, self.seed = study, records, reward, seed
        self.judge = judge.Judge(records, same_user, study.catalogue, encoder, seed)

    def faithfulness(self, texts: Sequence[str], vectors: Tensor | None) -> np.ndarray:
        """(n,) of each text to the ranking by item vectors (I+1, d)."""
        records, read = self.records[: len(texts)], self.study.catalogue
        pairs = zip(self.study.weights(records, vectors), records, texts, strict=True)
        return np.array([attribution.faithfulness(w, read.cited(r, t)) for w, r, t in pairs])

    def score(self, arm: str, texts: list[str], logprobs: Sequence[np.ndarray]) -> pd.DataFrame:
        """One row a text: reward, parts, ``FAITHFUL``, judge's measures. ``logprobs``: by token, of
        the base. ``faithfulness_served`` is to the base ranking: where an arm serves another, put
        ``faithfulness`` by its vectors there."""
        records = self.records[: len(texts)]
        total, parts = self.reward(records, texts)
        cited = [self.study.catalogue.cited(r, t) for r, t in zip(records, texts)]
        pairs = zip((r["history_weights"] for r in records), cited, strict=True)
        faithful = np.array([attribution.faithfulness(*pair) for pair in pairs])
        cites = np.array([len(places) > 0 for places in cited])
        only = np.where(cites, faithful, np.nan)
        drop = rank_drop.rank_drop(self.study, records, texts, self.seed % 2**32)
        measured = dict(zip(FAITHFUL, (faithful, faithful, only, cites, drop), strict=True))
        frame = pd.DataFrame(records)[["user", "item", "position", "title"]]
        scored = {f"reward_{name}": part for name, part in parts.items()}
        new = frame["item"].isin(self.study.heldout_items)
        frame = frame.assign(arm=arm, new_item=new, text=texts, reward=total, **scored, **measured)
        return frame.join(self.judge.score(texts, logprobs))

    def explain(
        self, arm: str, explainer: Explainer, params: Params, n: int | None = None
    ) -> pd.DataFrame:
        """``score`` of what the explainer says with its adapters as they are, with kl (to the base
        model), tokens and whether the text was finished."""
        limits = (params.max_new_tokens, params.temperature, self.seed)
        said = explain(explainer, self.records[:n], *limits, desc=f"explaining, {arm}")
        tokens = [len(r) for r in said.reference]
        scored = self.score(arm, said.texts, said.reference)
        return scored.assign(kl=said.kl, tokens=tokens, finished=said.ended)

    def controls(self, explainer: Explainer, temperature: float, n: int) -> pd.DataFrame:
        """``score`` of the controls for the first ``n`` records, of each rule's lines for all."""
        records = self.records[:n]
        made = composed.control_texts(records, [messages(r)[1]["content"] for r in records])
        texts = {f"{CONTROL}{name}": said for name, said in made.items()}
        texts |= {
            f"{RULE}{rule}": [composed.composed_line(r, rule) for r in self.records]
            for rule in composed.RULES
        }
        logprobs = {arm: [] for arm in texts}
        for row, record in enumerate(track(self.records, "reading composed texts")):
            own = {arm: said[row] for arm, said in texts.items() if row < len(said)}
            found = base_logprobs(explainer, record, [*own.values()], temperature)
            for arm, by_token in zip(own, found, strict=True):
                logprobs[arm].append(by_token)
        scored = [self.score(arm, said, logprobs[arm]) for arm, said in texts.items()]
        return pd.concat(scored, ignore_index=True)


@torch.no_grad()
def base_logprobs(
    explainer: Explainer, record: Record, texts: list[str], temperature: float
) -> list[np.ndarray]:
    """Per-token log-probabilities by the base model of each text after the record's prompt, EOS
    included; an empty text has none."""
    with explainer.reference():
        read = given(explainer, [prompt_ids(explainer, messages(record))], texts)
        logprobs = token_logprobs(explainer, read, temperature)
    return [row[real].cpu().numpy() for row, real in zip(logprobs, read.mask)]


def click_table(
    study: Study, explanations: pd.DataFrame, model: ClickModel, rng: np.random.Generator
) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    """(``explanations`` with each user's click probability ``ctr``; the base arm's standardised
    scores (n,); the users' noise (n,), which all arms share). An arm is about the base arm's users
    and items, or the first of them."""
    about = explanations.loc[explanations["arm"] == "base", ["user", "item"]].to_numpy()
    history = [study.split.with_valid[u] for u in about[:, 0]]
    rows = [
        mask_seen(scores, history[start : start + len(scores)])
        for start, scores in score_chunks(study.ranker, history, study.text)
    ]
    score = standardised_score(torch.cat(rows).numpy(), about[:, 1])
    noise, parts = rng.normal(size=len(about)), []
    for _, part in explanations.groupby("arm", sort=False):
        n = len(part)
        ctr = model.probabilities(score[:n], part["quality"], part["position"], noise[:n])
        parts.append(part.assign(ctr=ctr))
    return pd.concat(parts, ignore_index=True), score, noise


@dataclass
class Comparison:
    """Means and paired differences of arms with intervals over users, as rows of results."""

    table: pd.DataFrame  # a row an arm and user, users in one order; an arm may have the first few
    measures: Sequence[str]  # columns to report; NaN where a user has no value
    resamples: int
    rng: np.random.Generator

    def rows(
        self,
        arm: str,
        against: str = "",
        group: str = "all",
        keep: np.ndarray | None = None,
        measures: Sequence[str] | None = None,
    ) -> pd.DataFrame:
        """One row a measure: its mean over the users of ``arm``, or its mean difference to
        ``against`` over the users that both have, and the lift in ctr. ``keep`` (U,) selects the
        users of ``group``. Empty without users."""
        names = list(measures or self.measures)
        mine, other = (self.table[self.table["arm"] == one] for one in (arm, against or arm))
        n = min(len(mine), len(other))
        if not np.array_equal(mine["user"][:n], other["user"][:n]):
            raise ValueError(f"{arm} against {against}: not the same users in the same order")
        chosen = np.ones(n, bool) if keep is None else keep[:n]
        if not chosen.any():
            return pd.DataFrame()
        a, b = (t[names].astype(float).to_numpy()[:n][chosen].T for t in (mine, other))
        num = a - b if against else a
        den = ~np.isnan(num) * 1.0
        if against and "ctr" in names:
            ctr = names.index("ctr")
            num, den = np.vstack([num, a[ctr]]), np.vstack([den, b[ctr]])
            names.append("ctr_lift")
        found = stats.bootstrap(np.nan_to_num(num), den, self.resamples, self.rng)
        key = {"arm": arm, "against": against, "group": group, "measure": names}
        rows = pd.DataFrame(key | found._asdict() | {"n": (den != 0).sum(1)})
        return rows.dropna(subset="value")


def text_rows(scored: pd.DataFrame, resamples: int, rng: np.random.Generator) -> pd.DataFrame:
    """Every comparison of texts and clicks of ``click_table``: each arm, the tuned against base
    (also by group of items), their own warm start and each control."""
    parts = [name for name in scored if name.startswith("reward_")]
    measures = ["reward", *parts, *FAITHFUL, *judge.JUDGED, "kl", "tokens", "finished", "ctr"]
    compared = Comparison(scored, measures, resamples, rng)
    arms = list(scored["arm"].unique())
    rivals = [arm for arm in arms if arm.startswith((CONTROL, RULE))]
    new = scored.loc[scored["arm"] == "base", "new_item"].to_numpy(bool)
    few = np.arange(len(new)) < (scored["arm"] == f"{CONTROL}empty").sum()
    asked: list[tuple] = [(arm, against) for against in ("", "base") for arm in arms]
    for arm in TEXT_ARMS:
        asked += [(arm, against, "control_users", few, HEADLINE) for against in ("", "base")]
    for arm in TEXT_ARMS[1:]:
        asked += [(arm, "base", "seen_items", ~new), (arm, "base", "new_items", new)]
        if (warm := f"{arm}_warm") in arms:
            asked += [(arm, warm), (arm, warm, "new_items", new)]
        asked += [(arm, rival, "all", None, HEADLINE) for rival in rivals]
    out = [compared.rows(*key) for key in asked]
    out.append(
        share(scored, ("shielded", "base", "unshielded"), "reward", "gain_kept", resamples, rng)
    )
    for arm in TEXT_ARMS[1:]:
        between = arm, f"{arm}_warm", CEILING
        out.append(share(scored, between, "faithfulness", "ceiling_closed", resamples, rng))
    return with_separate(pd.concat(out, ignore_index=True))


def with_separate(rows: pd.DataFrame) -> pd.DataFrame:
    """``rows`` and those of ``separate``, whose texts are the unshielded policy's."""
    own = rows[(rows["arm"] == "unshielded") & (rows["against"].isin(["", "base"]))]
    own = own[own["measure"] != "faithfulness_served"]  # the base ranking is what separate serves
    served = own[own["measure"] == "faithfulness"].assign(measure="faithfulness_served")
    own = pd.concat([own, served]).assign(arm="separate")
    return pd.concat([rows, own], ignore_index=True)


def judge_rows(
    scorer: Scorer, scored: pd.DataFrame, resamples: int, rng: np.random.Generator
) -> pd.DataFrame:
    """The judge's measures of each arm's texts as a whole, and its paired measures of the same
    texts shuffled."""
    out, shuffled = [], []
    for arm in (*TEXT_ARMS, CEILING):
        said = scored[scored["arm"] == arm]
        texts = said["text"].tolist()
        whole = pd.Series(scorer.judge.corpus(texts), name="value").rename_axis("measure")
        key = {"arm": arm, "against": "", "group": "all", "n": len(texts)}
        out.append(whole.reset_index().assign(**key))
        shuffled.append(scorer.judge.shuffled(texts).assign(arm=arm, user=said["user"].tolist()))
    compared = Comparison(pd.concat(shuffled, ignore_index=True), judge.PAIRED, resamples, rng)
    out += [compared.rows(arm, group="shuffled") for arm in TEXT_ARMS]
    return with_separate(pd.concat(out, ignore_index=True))


def ranking_rows(
    ranking: pd.DataFrame, groups: Mapping[str, np.ndarray], resamples: int, rng
) -> pd.DataFrame:
    """The ranking by arm and against base, from ``ranking_change.ranking_table``, and the change of
    NDCG of each group of users, a mask (U,) such as those whose test film is of a group."""
    compared = Comparison(ranking.rename(columns=RANKING), [*RANKING.values()], resamples, rng)
    out = []
    for arm in ranking["arm"].unique():
        out += [compared.rows(arm), compared.rows(arm, "base", measures=["ndcg@10", "hr@10"])]
        changes = groups.items() if arm in TEXT_ARMS[1:] else ()
        out += [compared.rows(arm, "base", g, keep, ["ndcg@10"]) for g, keep in changes]
    return pd.concat(out, ignore_index=True)


def share(
    scored: pd.DataFrame,
    arms: tuple[str, str, str],
    measure: str,
    name: str,
    resamples: int,
    rng: np.random.Generator,
) -> pd.DataFrame:
    """How much of the way from start to end an arm has gone in ``measure``, as a row ``name``;
    ``arms`` are (arm, start, end), users are resampled jointly. Empty where the end is not above
    the start in every resample: a share of nothing means nothing."""
    values = [scored.loc[scored["arm"] == arm, measure].to_numpy(float) for arm in arms]
    n = min(map(len, values))
    mine, start, end = (column[:n] for column in values)
    if not n or end.mean() <= start.mean():
        return pd.DataFrame()
    found = stats.bootstrap(mine - start, end - start, resamples, rng)
    if np.isnan(found.low):
        return pd.DataFrame()
    key = {"arm": arms[0], "against": arms[2], "group": "all", "measure": name}
    return pd.DataFrame([key | found._asdict() | {"n": n}])


def tests(
    scored: pd.DataFrame, ranking: pd.DataFrame, resamples: int, rng: np.random.Generator
) -> pd.DataFrame:
    """p-values of the headline questions (random signs), ``<measure>_p``, and by Holm's correction
    for their number, ``<measure>_p_holm``, as rows of results. A tuned arm is held against base,
    and in faithfulness and rank_drop against its own warm start, where that has spoken."""
    tables = {name: scored for name in HEADLINE} | {"ndcg@10": ranking.rename(columns=RANKING)}
    asked = [(arm, "base", name) for arm in TEXT_ARMS[1:] for name in tables]
    warm = [arm for arm in TEXT_ARMS[1:] if f"{arm}_warm" in set(scored["arm"])]
    asked += [(arm, f"{arm}_warm", name) for arm in warm for name in HEADLINE[1:3]]
    rows = []
    for arm, against, name in asked:
        table = tables[name]
        a, b = (table.loc[table["arm"] == who, name].to_numpy(float) for who in (arm, against))
        n = min(len(a), len(b))
        p = float(stats.paired_p(a[:n] - b[:n], resamples, rng))
        rows.append({"arm": arm, "against": against, "measure": f"{name}_p", "value": p})
    raw = pd.DataFrame(rows)
    corrected = raw.assign(measure=raw["measure"] + "_holm", value=stats.holm(raw["value"]))
    return pd.concat([raw, corrected], ignore_index=True)


def detectable(scored: pd.DataFrame) -> pd.DataFrame:
    """Per profile, as results: the smallest gain of the shielded arm in these measures
    that its ``eval_users`` show with power .8, given this run's spread of paired differences."""
    mine, base = (scored[scored["arm"] == a].reset_index(drop=True) for a in ("shielded", "base"))
    spread = {m: (mine[m] - base[m]).std() for m in ("reward", "faithfulness", "quality")}
    lift = mine["ctr"].mean() / base["ctr"].mean()  # a ratio of means: delta method
    spread["ctr_lift"] = (mine["ctr"] - lift * base["ctr"]).std() / base["ctr"].mean()
    rows = []
    for profile, (name, std) in product(PROFILES, spread.items()):
        n = resolve(profile).eval_users
        key = {"arm": "shielded", "against": "base", "group": f"profile:{profile}", "n": n}
        value = stats.minimum_detectable(std, n)
        rows.append(key | {"measure": f"{name}_detectable", "value": value})
    return pd.DataFrame(rows)


def beaten_controls(table: pd.DataFrame, arm: str) -> dict[str, bool]:
    """Of each control: is ``arm`` above it by the whole interval, in reward and in clicks?"""
    rows = table[(table["arm"] == arm) & table["against"].str.startswith(CONTROL)]
    low = rows.set_index(["against", "measure"])["low"]
    return {
        name.removeprefix(CONTROL): bool(low[name, "reward"] > 0 and low[name, "ctr_lift"] > 1)
        for name in sorted(set(rows["against"]))
    }


def pivot(
    table: pd.DataFrame,
    index: str | list[str] = "measure",
    columns: str | list[str] = "arm",
    spec: str = ".3f",
    **where: str | Iterable[str],
) -> pd.DataFrame:
    """Results as texts "value [low, high]", in the order in which they are asked for, or come.
    ``where`` selects rows: ``pivot(table, measure=["reward", "kl"], against="")``."""
    for name, wanted in where.items():
        wanted = [wanted] if isinstance(wanted, str) else list(wanted)
        table = table[table[name].isin(wanted)]
        table = table.sort_values(name, key=lambda c, w=wanted: c.map(w.index), kind="stable")
    cells = [stats.interval(*row, spec) for row in table[["value", "low", "high"]].to_numpy(float)]
    wide = table.assign(cell=cells).pivot(index=index, columns=columns, values="cell").fillna("")
    first = [table.set_index(names).index.unique() for names in (index, columns)]
    return wide.reindex(index=first[0], columns=first[1])
