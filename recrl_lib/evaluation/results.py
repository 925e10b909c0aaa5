"""Arms side by side: what tuning did to the ranking, to the explanations, and to simulated clicks.

Ranking is measured on all users; explanations on held-out users whose prompts PPO never saw. All
arms explain the same items to the same users with the same random numbers, and the click model
scores items with the *base* ranker, so that a lift can come from the words alone.

Everything ends as rows of ``metrics/evaluation.csv``: the mean of a measure per ``arm``, and its
paired difference to the arm named in ``against`` (for ``ctr_lift`` the ratio of clicks).
``separate`` speaks with the unshielded policy. Groups: ``new_items`` and ``seen_items`` (films that
PPO explained to nobody, or to others), ``control_users`` (the users for whom controls were scored),
``shuffled`` (texts permuted among the records), ``profile:<name>``.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from recrl_lib.evaluation import stats
from recrl_lib.evaluation.clicks import ClickModel, standardised_score
from recrl_lib.explainer.model import Explainer, left_pad
from recrl_lib.explainer.prompts import Record, messages, prompt_ids
from recrl_lib.explainer.sampling import explain
from recrl_lib.params import PROFILES, TOP_K, Params, resolve
from recrl_lib.ranker.ranking import mask_seen, score_chunks
from recrl_lib.scoring import composed, judge
from recrl_lib.study import Study

TEXT_ARMS = ("base", "unshielded", "shielded")
CONTROL = "control_"  # arms of texts composed by rule; "reference" is the human-made ceiling
HEADLINE = ("reward", "quality", "ctr")
# Columns of the ranking table, and the measures that their means are.
RANKING = {
    "ndcg": "ndcg@10", "hr": "hr@10", "overlap": "top10_overlap", "set_same": "top10_set_same",
    "exact": "top10_exact", "kendall_tau": "kendall_tau", "rbo": "rbo", "top1_same": "top1_same",
}  # fmt: skip


# --- texts and their scores


class Scorer:
    """Scores texts on ``records`` (or on the first few of them), the same way for every arm.

    Args:
        study: the run's tables.
        records: what the texts are about.
        reward: ``(records, texts) -> (total (n,), parts)``, such as ``scoring.reward.Reward``.
        encoder: such as ``judge.SentenceEncoder``.
        seed: the same random numbers and candidates for all arms.
    """

    def __init__(
        self, study: Study, records: Sequence[Record], reward: Callable, encoder, seed: int
    ):
        users = [r["user"] for r in records]
        lists = [study.records(users, [p] * len(users)) for p in range(1, TOP_K + 1)]
        same_user = [
            [r, *(row[i] for row in lists if row[i]["position"] != r["position"])]
            for i, r in enumerate(records)
        ]
        self.study, self.records, self.reward, self.seed = study, records, reward, seed
        self.judge = judge.Judge(records, same_user, study.catalogue, encoder, seed)

    def score(self, arm: str, texts: Sequence[str], logprobs: Sequence[np.ndarray]) -> pd.DataFrame:
        """One row a text: reward and parts, and every judge measure. ``logprobs``: per token, by
        the base model."""
        records = self.records[: len(texts)]
        total, parts = self.reward(records, texts)
        fields = {key: [r[key] for r in records] for key in ("user", "item", "position", "title")}
        new = np.isin(fields["item"], self.study.heldout_items)
        rewards = {"reward": total} | {f"reward_{name}": part for name, part in parts.items()}
        columns = {"arm": arm, **fields, "new_item": new, "text": list(texts), **rewards}
        return pd.concat([pd.DataFrame(columns), self.judge.score(texts, logprobs)], axis=1)

    def explain(
        self, arm: str, explainer: Explainer, params: Params, n: int | None = None
    ) -> pd.DataFrame:
        """``score`` of what the explainer says with its adapters as they are, with kl (to the base
        model), tokens and whether the text was finished."""
        said = explain(
            explainer, self.records[:n], params.max_new_tokens, params.temperature, self.seed,
            desc=f"explaining, {arm}",
        )  # fmt: skip
        tokens = [len(r) for r in said.reference]
        return self.score(arm, said.texts, said.reference).assign(
            kl=said.kl, tokens=tokens, finished=said.ended
        )

    def controls(self, explainer: Explainer, temperature: float, n: int) -> pd.DataFrame:
        """``score`` of the control texts and of the reference lines, for the first ``n``
        records."""
        records = self.records[:n]
        made = composed.control_texts(records, [messages(r)[1]["content"] for r in records])
        texts = {f"{CONTROL}{name}": said for name, said in made.items()}
        texts["reference"] = [composed.reference_line(r) for r in records]
        said = [text for part in texts.values() for text in part]
        logprobs = iter(base_logprobs(explainer, [*records] * len(texts), said, temperature))
        scored = [self.score(arm, t, [next(logprobs) for _ in t]) for arm, t in texts.items()]
        return pd.concat(scored, ignore_index=True)


@torch.no_grad()
def base_logprobs(
    explainer: Explainer,
    records: Sequence[Record],
    texts: Sequence[str],
    temperature: float,
    batch: int = 16,
) -> list[np.ndarray]:
    """Per-token log-probabilities of given texts, EOS included, after their records' prompts, by
    the base model.

    An empty text has none. Texts of similar length share a batch.
    """
    prompts = [prompt_ids(explainer, messages(r)) for r in records]
    ids = explainer.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    answers = [[*own, explainer.eos_id] if t else [] for own, t in zip(ids, texts)]
    out = [np.zeros(0, np.float32)] * len(texts)
    lengths = [len(p) + len(a) for p, a in zip(prompts, answers)]
    order = sorted((i for i, a in enumerate(answers) if a), key=lengths.__getitem__)
    with explainer.reference():
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            ids, mask = left_pad(
                [prompts[i] + answers[i] for i in rows], explainer.pad_id, explainer.device
            )
            width = max(len(answers[i]) for i in rows)
            hidden = explainer.top(explainer.trunk(ids[:, :-1], mask[:, :-1]), mask[:, :-1])
            logp = explainer.log_softmax(hidden[:, -width:], temperature)
            chosen = logp.gather(-1, ids[:, -width:, None])[..., 0].cpu().numpy()
            for i, row in zip(rows, chosen):
                out[i] = row[-len(answers[i]) :]
    return out


def click_table(
    study: Study, explanations: pd.DataFrame, model: ClickModel, rng: np.random.Generator
) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    """(``explanations`` with a column ``ctr``, each user's click probability; the base arm's users'
    standardised scores (n,); the users' noise (n,), which all arms share).

    Raises ``ValueError`` if an arm is not about the base arm's users and items, or the first of
    them.
    """
    first = explanations[explanations["arm"] == TEXT_ARMS[0]]
    users, items = first["user"].to_numpy(), first["item"].to_numpy()
    history = [study.split.with_valid[u] for u in users]
    rows = [
        mask_seen(scores, history[start : start + len(scores)])
        for start, scores in score_chunks(study.ranker, history, study.text)
    ]
    score, noise = standardised_score(torch.cat(rows).numpy(), items), rng.normal(size=len(users))
    parts = []
    for arm, part in explanations.groupby("arm", sort=False):
        n = len(part)
        if not np.array_equal(part[["user", "item"]], first[["user", "item"]][:n]):
            raise ValueError(
                f"arm {arm}: not about the base arm's users and items, or the first of them"
            )
        ctr = model.probabilities(score[:n], part["quality"], part["position"], noise[:n])
        parts.append(part.assign(ctr=ctr))
    return pd.concat(parts, ignore_index=True), score, noise


# --- rows of results


@dataclass
class Comparison:
    """Means and paired differences of arms with intervals over users, as rows of results.

    Args:
        table: one row an arm and user: arm, user and one column a measure; the users in the same
            order in every arm, of which an arm may have the first few only.
        measures: the columns to report. NaN: that user has no value, and is left out of that
            measure.
        resamples, rng: of the bootstrap.
    """

    table: pd.DataFrame
    measures: Sequence[str]
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
        frame = pd.DataFrame(key | found._asdict() | {"n": (den != 0).sum(1)})
        return frame.dropna(subset="value")


def text_rows(scored: pd.DataFrame, resamples: int, rng: np.random.Generator) -> pd.DataFrame:
    """Every comparison of texts and clicks: each arm, the tuned ones against base (also by group of
    items), against their own warm start and against each control. ``scored``: from ``click_table``,
    all arms."""
    parts = [name for name in scored if name.startswith("reward_")]
    measures = ["reward", *parts, *judge.JUDGED, "kl", "tokens", "finished", "ctr"]
    compared = Comparison(scored, [m for m in measures if m in scored], resamples, rng)
    arms = list(scored["arm"].unique())
    controls = [arm for arm in arms if arm.startswith(CONTROL)]
    n, new = (scored["arm"] == "reference").sum(), scored.loc[scored["arm"] == "base", "new_item"]
    few, new = np.arange(len(new)) < n, new.to_numpy(bool)
    out = [compared.rows(arm) for arm in arms]
    out += [compared.rows(arm, "base") for arm in arms]
    for arm in TEXT_ARMS:
        out.append(compared.rows(arm, "", "control_users", few, HEADLINE))
        out.append(compared.rows(arm, "base", "control_users", few, HEADLINE))
    for arm in TEXT_ARMS[1:]:
        out.append(compared.rows(arm, "base", "seen_items", ~new))
        out.append(compared.rows(arm, "base", "new_items", new))
        if f"{arm}_warm" in arms:
            out.append(compared.rows(arm, f"{arm}_warm"))
        rivals = [*controls, "reference"] if n else controls
        out += [compared.rows(arm, rival, measures=HEADLINE) for rival in rivals]
    return with_separate(pd.concat([*out, gain_kept(scored, resamples, rng)], ignore_index=True))


def with_separate(rows: pd.DataFrame) -> pd.DataFrame:
    """``rows`` and those of ``separate``, whose texts are the unshielded policy's."""
    own = rows[(rows["arm"] == "unshielded") & (rows["against"].isin(["", "base"]))]
    return pd.concat([rows, own.assign(arm="separate")], ignore_index=True)


def judge_rows(
    scorer: Scorer, scored: pd.DataFrame, resamples: int, rng: np.random.Generator
) -> pd.DataFrame:
    """The judge's measures of each arm's texts as a whole, and its paired measures of the same
    texts shuffled."""
    rows, shuffled = [], []
    for arm in (*TEXT_ARMS, "reference"):
        said = scored[scored["arm"] == arm]
        texts = said["text"].tolist()
        rows += [
            {"arm": arm, "measure": name, "value": value, "n": len(texts)}
            for name, value in scorer.judge.corpus(texts).items()
        ]
        shuffled.append(scorer.judge.shuffled(texts).assign(arm=arm, user=said["user"].tolist()))
    compared = Comparison(pd.concat(shuffled, ignore_index=True), judge.PAIRED, resamples, rng)
    permuted = [compared.rows(arm, group="shuffled") for arm in TEXT_ARMS]
    whole = pd.DataFrame(rows).assign(against="", group="all")
    return with_separate(pd.concat([whole, *permuted], ignore_index=True))


def ranking_rows(
    ranking: pd.DataFrame,
    groups: Mapping[str, np.ndarray],
    resamples: int,
    rng: np.random.Generator,
) -> pd.DataFrame:
    """The ranking by arm and against base, and the change of NDCG of each group of users.

    ``ranking``: one row an arm and user, from ``ranking_change.ranking_table``. ``groups``: mask of
    users (U,), such as those whose test film is of a group of items.
    """
    compared = Comparison(ranking.rename(columns=RANKING), [*RANKING.values()], resamples, rng)
    out = []
    for arm in ranking["arm"].unique():
        out += [compared.rows(arm), compared.rows(arm, "base", measures=["ndcg@10", "hr@10"])]
        if arm in TEXT_ARMS[1:]:
            changes = groups.items()
            out += [compared.rows(arm, "base", g, keep, ["ndcg@10"]) for g, keep in changes]
    return pd.concat(out, ignore_index=True)


def gain_kept(scored: pd.DataFrame, resamples: int, rng: np.random.Generator) -> pd.DataFrame:
    """Share of the unshielded gain in reward that the shielded policy has, users resampled jointly.

    Empty where the unshielded gain is not above 0 in every resample: a share of nothing means
    nothing.
    """
    base, free, held = (
        scored.loc[scored["arm"] == arm, "reward"].to_numpy(float) for arm in TEXT_ARMS
    )
    found = stats.bootstrap(held - base, free - base, resamples, rng)
    if free.mean() <= base.mean() or np.isnan(found.low):
        return pd.DataFrame()
    key = {"arm": "shielded", "against": "unshielded", "group": "all", "measure": "gain_kept"}
    return pd.DataFrame([key | found._asdict() | {"n": len(base)}])


def tests(
    scored: pd.DataFrame, ranking: pd.DataFrame, resamples: int, rng: np.random.Generator
) -> pd.DataFrame:
    """p-values of eight questions (random signs), and after Holm's correction over all of them.

    Rows of results with the measures ``<measure>_p`` and ``<measure>_p_holm``.
    """
    tables = {name: scored for name in HEADLINE}
    tables["ndcg@10"] = ranking.rename(columns=RANKING)
    keys, p = [(arm, name) for arm in TEXT_ARMS[1:] for name in tables], []
    for arm, name in keys:
        table = tables[name]
        a, b = (table.loc[table["arm"] == who, name].to_numpy(float) for who in (arm, "base"))
        p.append(float(stats.paired_p(a - b, resamples, rng)))
    return pd.DataFrame(
        {"arm": arm, "against": "base", "measure": name + end, "value": value}
        for end, values in (("_p", p), ("_p_holm", stats.holm(np.array(p))))
        for (arm, name), value in zip(keys, values)
    )


def detectable(scored: pd.DataFrame, arm: str = "shielded") -> pd.DataFrame:
    """Per profile, as results: the smallest gain in reward, quality and CTR lift that its
    ``eval_users`` show with power .8, given this run's spread of the paired differences."""
    mine, base = (scored[scored["arm"] == a].reset_index(drop=True) for a in (arm, "base"))
    spread = {m: (mine[m] - base[m]).std() for m in ("reward", "quality")}
    spread["ctr_lift"] = stats.ratio_influence(mine["ctr"], base["ctr"]).std(ddof=1)
    key = {"arm": arm, "against": "base"}
    users = {profile: resolve(profile).eval_users for profile in PROFILES}
    return pd.DataFrame(
        key
        | {"group": f"profile:{profile}", "measure": f"{name}_detectable", "n": n}
        | {"value": stats.minimum_detectable(std, n)}
        for profile, n in users.items()
        for name, std in spread.items()
    )


def beaten_controls(table: pd.DataFrame, arm: str) -> dict[str, bool]:
    """Of each control: is tuned ``arm`` shown to be above it, in reward and in clicks, by the whole
    interval?"""
    rows = table[(table["arm"] == arm) & table["against"].str.startswith(CONTROL)]
    low = rows.pivot(index="against", columns="measure", values="low")
    found = (low["reward"] > 0) & (low["ctr_lift"] > 1) if len(low) else pd.Series(dtype=bool)
    return {str(name).removeprefix(CONTROL): bool(yes) for name, yes in found.items()}


def pivot(
    table: pd.DataFrame,
    index: str | list[str] = "measure",
    columns: str | list[str] = "arm",
    spec: str = ".3f",
    **where: str | Iterable[str],
) -> pd.DataFrame:
    """Results as a table of texts "value [low, high]", in the order in which they are asked for, or
    come.

    ``where`` selects rows by column: ``pivot(table, measure=["reward", "kl"], against="")``.
    """
    for name, wanted in where.items():
        wanted = [wanted] if isinstance(wanted, str) else list(wanted)
        table = table[table[name].isin(wanted)]
        table = table.sort_values(name, key=lambda c, w=wanted: c.map(w.index), kind="stable")
    cells = [stats.interval(*row, spec) for row in table[["value", "low", "high"]].to_numpy(float)]
    wide = table.assign(cell=cells).pivot(index=index, columns=columns, values="cell").fillna("")
    first = [table.set_index(names).index.unique() for names in (index, columns)]
    return wide.reindex(index=first[0], columns=first[1])
