"""Arms side by side: what tuning did to the ranking, to the explanations, and to simulated clicks.

Ranking is measured on all users; explanations on held-out users whose prompts PPO never saw. All arms
explain the same items to the same users with the same random numbers (a fixed slate), and the click
model scores items with the *base* ranker, so a lift can come from the words alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from recrl_lib.evaluation import stats
from recrl_lib.evaluation.clicks import (
    ASSUMPTIONS,
    FACTORS,
    ClickModel,
    Noise,
    ctr_lift,
    sensitivity,
    standardised_score,
)
from recrl_lib.evaluation.ranking_change import _stayed
from recrl_lib.explainer.model import Explainer, left_pad
from recrl_lib.explainer.prompts import messages, prompt_ids
from recrl_lib.explainer.sampling import explain
from recrl_lib.params import PROFILES, resolve
from recrl_lib.ranker.ranking import mask_seen, score_chunks
from recrl_lib.scoring import composed, judge
from recrl_lib.study import TOP_K, Study

TEXT_ARMS = ("base", "unshielded", "shielded")  # `separate` speaks with the unshielded policy
CONTROL = "control_"  # arms of texts composed by rule; "reference" is the human-made ceiling
CHURN = {"top10_overlap": "overlap", "top10_set_same": "set_same", "top10_exact": "exact", "kendall_tau": "kendall_tau", "rbo": "rbo",
         "top1_same": "top1_same"}  # name in the metrics: column of the ranking table  # fmt: skip


def held_overlap(
    study: Study, top: np.ndarray, held: set[int], n_boot: int, rng: np.random.Generator
) -> dict[str, float]:
    """``overlap_held`` of ``change_by_group`` with its interval over users; empty if too few base top tens have an item of ``held``."""
    theirs = np.isin(study.top, sorted(held))
    kept = _stayed(study, top) & theirs
    try:
        return _with_ends(
            "overlap_held", stats.bootstrap_ratio(kept.sum(1), theirs.sum(1), n_boot, rng)
        )
    except ValueError:  # a resample without any
        return {}


def ndcg_by_group(
    study: Study,
    table: pd.DataFrame,
    base: pd.DataFrame,
    held: set[int],
    n_boot: int,
    rng: np.random.Generator,
) -> dict[str, float]:
    """Change of NDCG@10 against ``base`` (both from ``ranking_table``) with its interval, for users whose test item is in ``held`` and
    for the others (``seen``): ``ndcg@10_change_<group>``. A group without users is left out."""
    theirs = np.isin(study.split.test, sorted(held))
    change = (table["ndcg"] - base["ndcg"]).to_numpy()
    out = {}
    for group, users in (("seen", ~theirs), ("held", theirs)):
        if users.any():
            out |= _with_ends(
                f"ndcg@10_change_{group}", stats.bootstrap_mean(change[users], n_boot, rng)
            )
    return out


@dataclass
class Panel:
    """What all arms' texts are scored with. Arms may have texts for the first few ``records`` only."""

    study: Study
    records: list[dict]
    rivals: list[list[dict]]  # each record and the same user's other recommended films
    reward: object  # ``rewards.Reward``
    encoder: object  # ``judge.SentenceEncoder``
    seed: int  # shared by the arms: the same random numbers, the same candidates

    def score(self, arm: str, texts: Sequence[str], logprobs: Sequence[np.ndarray]) -> pd.DataFrame:
        """One row a text: reward and parts, and every judge measure. ``logprobs``: per token, by the base LLM."""
        records, rivals = self.records[: len(texts)], self.rivals[: len(texts)]
        total, parts = self.reward(records, texts)
        unseen = set(self.study.heldout_items.tolist())
        table = pd.DataFrame(
            {
                "arm": arm,
                **{key: [r[key] for r in records] for key in ("user", "item", "position", "title")},
                "new_item": [r["item"] in unseen for r in records],
                "text": list(texts),
                "reward": total,
                **{f"reward_{k}": v for k, v in parts.items()},
            }
        )
        rng = np.random.default_rng(self.seed)
        judged = judge.judge_texts(
            records,
            texts,
            logprobs,
            self.encoder,
            self.study.catalogue,
            rng,
            pool=self.records,
            rivals=rivals,
        )
        return pd.concat([table, judged], axis=1)

    def explain(self, arm: str, explainer: Explainer, params, n: int | None = None) -> pd.DataFrame:
        """``score`` of what the explainer says with its adapters as they are, and kl (to the base model) tokens ended."""
        said = explain(
            explainer,
            self.records[:n],
            params.max_new_tokens,
            params.temperature,
            self.seed,
            desc=f"explaining, {arm}",
        )
        lengths = [len(r) for r in said.reference]
        return self.score(arm, said.texts, said.reference).assign(
            kl=said.kl, tokens=lengths, ended=said.ended
        )

    def controls(self, explainer: Explainer, temperature: float, n: int) -> pd.DataFrame:
        """``score`` of the control texts and of the reference lines, for the first ``n`` records."""
        records = self.records[:n]
        texts = {
            f"{CONTROL}{name}": said
            for name, said in composed.control_texts(
                records, [messages(r)[1]["content"] for r in records]
            ).items()
        }
        texts["reference"] = [composed.reference_line(r) for r in records]
        said = [text for part in texts.values() for text in part]
        logprobs = iter(base_logprobs(explainer, records * len(texts), said, temperature))
        return pd.concat(
            [self.score(arm, part, [next(logprobs) for _ in part]) for arm, part in texts.items()],
            ignore_index=True,
        )

    def shuffled(self, arm: str, texts: Sequence[str]) -> dict[str, float]:
        """Mean of each paired judge measure for the same texts permuted among the records."""
        frame = judge.shuffled(
            self.records,
            texts,
            self.encoder,
            self.study.catalogue,
            np.random.default_rng(self.seed),
            rivals=self.rivals,
        )
        return {f"{arm}/{NAMES.get(m, m)}_shuffled": _mean(frame[m]) for m in judge.PAIRED}


def panel(study: Study, records: list[dict], reward, encoder, seed: int) -> Panel:
    users = [r["user"] for r in records]
    others = [study.records(users, [p] * len(users)) for p in range(1, TOP_K + 1)]
    rivals = [
        [r, *(row[i] for row in others if row[i]["position"] != r["position"])]
        for i, r in enumerate(records)
    ]
    return Panel(study, records, rivals, reward, encoder, seed)


@torch.no_grad()
def base_logprobs(
    explainer: Explainer,
    records: Sequence[dict],
    texts: Sequence[str],
    temperature: float,
    batch: int = 16,
) -> list[np.ndarray]:
    """Per-token log-probabilities of given texts, EOS included, after their records' prompts, by the base LLM.

    An empty text has none. Texts of like length share a batch.
    """
    prompts = [prompt_ids(explainer, messages(r)) for r in records]
    answers = [
        explainer.tokenizer(t, add_special_tokens=False)["input_ids"] + [explainer.eos_id]
        if t
        else []
        for t in texts
    ]
    out = [np.zeros(0, np.float32)] * len(texts)
    order = sorted(
        (i for i, a in enumerate(answers) if a), key=lambda i: len(prompts[i]) + len(answers[i])
    )
    with explainer.reference():
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            ids, mask = left_pad(
                [prompts[i] + answers[i] for i in rows], explainer.pad_id, explainer.device
            )
            width = max(len(answers[i]) for i in rows)
            hidden = explainer.top(explainer.trunk(ids[:, :-1], mask[:, :-1]), mask[:, :-1])[
                :, -width:
            ]
            logp = (
                explainer.log_softmax(hidden, temperature)
                .gather(-1, ids[:, -width:, None])[..., 0]
                .cpu()
                .numpy()
            )
            for i, row in zip(rows, logp):
                out[i] = row[-len(answers[i]) :]
    return out


def click_table(
    study: Study, explanations: pd.DataFrame, model: ClickModel, rng: np.random.Generator
) -> tuple[pd.DataFrame, np.ndarray, Noise]:
    """(``explanations`` with a column ``click``: the click probability under noise that all arms share;
    the base arm's users' standardised scores (n,); the noise)."""
    first = explanations[explanations["arm"] == TEXT_ARMS[0]]
    users, items = first["user"].to_numpy(), first["item"].to_numpy()
    history = [study.split.with_valid[u] for u in users]
    rows = [
        mask_seen(scores, history[start : start + len(scores)])
        for start, scores in score_chunks(study.ranker, history, study.text)
    ]
    score = standardised_score(torch.cat(rows).numpy(), items)
    noise = model.draw(len(users), rng)
    parts = []
    for arm, part in explanations.groupby("arm", sort=False):
        n = len(part)
        if (
            n > len(users)
            or not np.array_equal(part["user"], users[:n])
            or not np.array_equal(part["item"], items[:n])
        ):
            raise ValueError(
                f"arm {arm}: its explanations are not about the base arm's users and items, or the first of them"
            )
        heard = Noise(noise.user_bias[:n], noise.uniform[:n])
        click = model.probabilities(
            score[:n], part["quality"].to_numpy(), part["position"].to_numpy(), heard
        )
        parts.append(part.assign(click=click))
    return pd.concat(parts, ignore_index=True), score, noise


def sensitivity_table(
    explanations: pd.DataFrame, model: ClickModel, score: np.ndarray, noise: Noise
) -> pd.DataFrame:
    """Lift of each tuned arm with two of the click model's assumptions multiplied: arm, first, second, the two
    factors, lift. See ``simulator.sensitivity``."""
    base = explanations[explanations["arm"] == "base"]
    frames = []
    for arm in TEXT_ARMS[1:]:
        quality = explanations.loc[explanations["arm"] == arm, "quality"].to_numpy()
        lift = sensitivity(
            model, score, quality, base["quality"].to_numpy(), base["position"].to_numpy(), noise
        )
        i, j = np.meshgrid(FACTORS, FACTORS, indexing="ij")
        frames += [
            pd.DataFrame(
                {
                    "arm": arm,
                    "first": first,
                    "second": second,
                    "first_factor": i.ravel(),
                    "second_factor": j.ravel(),
                    "lift": grid.ravel(),
                }
            )  # fmt: skip
            for (first, second), grid in zip(ASSUMPTIONS, lift, strict=True)
        ]
    return pd.concat(frames, ignore_index=True)


# What a measure of the judge is called in the metrics, where not by its column's name.
NAMES = {"own_item": "own_item_retrieval@10", "own_item_masked": "own_item_masked@10", "own_film": "own_film_retrieval@10",
         "own_film_masked": "own_film_masked@10", "feature_match": "fmr"}  # fmt: skip
JUDGED = (*judge.PAIRED, "fluency", "readability", "words", "quality")


def _mean(values: pd.Series) -> float:
    """Mean without NaN; 0 if there is nothing else: an arm that claims nothing supports nothing."""
    kept = values.dropna()
    return float(kept.mean()) if len(kept) else 0.0


def judge_metrics(
    arm: str, said: pd.DataFrame, records: Sequence[dict], catalogue
) -> dict[str, float]:
    """The judge's means of one arm's texts (on the first of ``records``), and measures of the texts as a whole."""
    texts = said["text"].tolist()
    named = [judge.features(r, t, catalogue) for r, t in zip(records, texts)]
    out = {NAMES.get(m, m): _mean(said[m]) for m in JUDGED} | {
        "claiming_share": said["grounding_precision"].notna().mean(),
        "fcr": judge.feature_coverage(records[: len(texts)], named),
        "div": judge.feature_diversity(named),
        "distinct_1": judge.distinct_n(texts, 1),
        "distinct_2": judge.distinct_n(texts, 2),
        "usr": judge.usr(texts),
    }
    return {f"{arm}/{name}": float(value) for name, value in out.items()}


def judge_table(results: dict[str, float]) -> pd.DataFrame:
    """The judge's measures (rows) of each text arm, of its texts shuffled among the records, and of the reference
    lines. Empty where shuffling changes nothing (measures of the texts alone) or is not defined."""
    shown = [NAMES.get(m, m) for m in JUDGED] + ["fcr", "div", "distinct_1", "distinct_2", "usr"]
    columns = {}
    for arm in (*TEXT_ARMS, "reference"):
        columns[arm] = [results[f"{arm}/{m}"] for m in shown]
        if arm in TEXT_ARMS:
            columns[f"{arm}, shuffled"] = [
                results.get(f"{arm}/{m}_shuffled", np.nan) for m in shown
            ]
    return pd.DataFrame(columns, index=shown)


def control_table(results: dict[str, float]) -> pd.DataFrame:
    """Reward, quality and CTR lift of the controls, the reference lines and, last, the arms on the same users; beside each
    control, as text with intervals, by how much the tuned arms are above it in reward, and their clicks over its clicks."""
    rows = {arm.removeprefix(CONTROL): f"{arm}/" for arm in dict.fromkeys(key.split("/")[0] for key in results)
            if arm.startswith(CONTROL) or arm == "reference"}  # fmt: skip
    rows |= {arm: f"{arm}/control_users_" for arm in TEXT_ARMS}
    frame = pd.DataFrame(
        {
            name: {m: results[f"{prefix}{m}"] for m in (*GAINS, "ctr_lift")}
            for name, prefix in rows.items()
        }
    ).T
    for arm in TEXT_ARMS[1:]:
        for title, measure in (("reward above", "reward"), ("clicks over", "clicks")):
            keys = {name: f"{arm}/{measure}_over_{CONTROL}{name}" for name in rows}
            frame[f"{title}, {arm}"] = [
                stats.bracketed(results, keys[name], ".2f") if keys[name] in results else ""
                for name in rows
            ]
    return frame


def gain_table(results: dict[str, float]) -> pd.DataFrame:
    """Gains with their intervals as text: over the base on all items, on items that PPO explained and on new ones,
    and over the warm start; one row an arm and comparison."""
    rows = []
    for arm in TEXT_ARMS[1:]:
        for what, title in (("change", "over base"), ("seen_items", "over base, items of the training"),
                            ("new_items", "over base, new items"), ("by_ppo", "over the warm start")):  # fmt: skip
            keys = {m: f"{arm}/{m}_{what}" for m in GAINS} | {
                "ctr_lift": f"{arm}/ctr_lift" + ("" if what == "change" else f"_{what}")
            }
            if all(key in results for key in keys.values()):
                rows.append(
                    {
                        "arm": arm,
                        "gain": title,
                        "users": int(results.get(f"{arm}/users_{what}", results["eval_users"])),
                    }
                    | {m: stats.bracketed(results, key, ".3f") for m, key in keys.items()}
                )
    return pd.DataFrame(rows)


def control_metrics(
    explanations: pd.DataFrame, n_boot: int, rng: np.random.Generator
) -> dict[str, float]:
    """Of each control and of the reference lines: reward, quality and CTR lift over the base arm, same users; the
    same of each arm on these users, as ``<arm>/control_users_…``; and, user by user with intervals, what each tuned arm has
    over each control: the difference in reward and the ratio of clicks, as ``<arm>/reward_over_<control>`` and ``clicks_over``."""
    n = int((explanations["arm"] == "reference").sum())
    out = {"users_controls": float(n)}
    said = {arm: part.iloc[:n] for arm, part in explanations.groupby("arm", sort=False)}
    controls = [arm for arm in said if arm.startswith(CONTROL)]
    for arm in (*controls, "reference", *TEXT_ARMS):
        prefix = f"{arm}/control_users_" if arm in TEXT_ARMS else f"{arm}/"
        out |= {f"{prefix}{m}": float(said[arm][m].mean()) for m in ("reward", "quality")}
        out[f"{prefix}ctr_lift"] = float(said[arm]["click"].mean() / said["base"]["click"].mean())
    for arm in TEXT_ARMS[1:]:
        for control in controls:
            policy, rival = (
                {m: said[a][m].to_numpy(float) for m in ("reward", "click")} for a in (arm, control)
            )
            out |= _with_ends(
                f"{arm}/reward_over_{control}",
                stats.bootstrap_mean(policy["reward"] - rival["reward"], n_boot, rng),
            )
            out |= _with_ends(
                f"{arm}/clicks_over_{control}",
                ctr_lift(policy["click"], rival["click"], n_boot, rng),
            )
    return out


def losers(results: dict[str, float], arm: str) -> dict[str, bool]:
    """Of each control: is it shown to be below tuned ``arm`` on the same users, under the reward and in simulated clicks?

    Shown: the whole interval is.
    """
    mark = f"{arm}/reward_over_{CONTROL}"
    names = sorted(
        key.removeprefix(mark)
        for key in results
        if key.startswith(mark) and not key.endswith(("_lo", "_hi"))
    )
    return {
        name: results[f"{mark}{name}_lo"] > 0
        and results[f"{arm}/clicks_over_{CONTROL}{name}_lo"] > 1
        for name in names
    }


GAINS = ("reward", "quality")


def gain_metrics(
    arm: str,
    after: pd.DataFrame,
    before: pd.DataFrame,
    what: str,
    n_boot: int,
    rng: np.random.Generator,
) -> dict[str, float]:
    """Paired gains of ``after`` over ``before``, the same users: reward, quality and CTR lift with intervals,
    keyed ``<arm>/<measure>_<what>``; empty if there are no users."""
    out: dict[str, float] = {}
    if not len(after):
        return out
    for name in GAINS:
        difference = after[name].to_numpy() - before[name].to_numpy()
        out |= _with_ends(f"{arm}/{name}_{what}", stats.bootstrap_mean(difference, n_boot, rng))
    lift = ctr_lift(after["click"].to_numpy(), before["click"].to_numpy(), n_boot, rng)
    return (
        out
        | _with_ends(f"{arm}/ctr_lift_{what}", lift)
        | {f"{arm}/users_{what}": float(len(after))}
    )


def judged_gains(
    arm: str, explanations: pd.DataFrame, n_boot: int, rng: np.random.Generator
) -> dict[str, float]:
    """Paired change from the base of every measure of the judge, on all items and on those that PPO never explained, keyed
    ``<arm>/<measure>_change`` and ``<arm>/<measure>_new_items``. A text without claims has no grounding precision: such users are
    left out of it, in both arms."""
    said, base = (explanations[explanations["arm"] == a] for a in (arm, "base"))
    out: dict[str, float] = {}
    for measure in (m for m in JUDGED if m not in GAINS):
        difference, new = (
            said[measure].to_numpy(float) - base[measure].to_numpy(float),
            base["new_item"].to_numpy(bool),
        )
        for what, keep in (("change", np.ones_like(new)), ("new_items", new)):
            values = difference[keep & ~np.isnan(difference)]
            if len(values):
                out |= _with_ends(
                    f"{arm}/{NAMES.get(measure, measure)}_{what}",
                    stats.bootstrap_mean(values, n_boot, rng),
                )
    return out


def judged_gain_table(results: dict[str, float]) -> pd.DataFrame:
    """``judged_gains`` as text, a row a measure: the base's mean, and each tuned arm's change on all items and on new ones."""
    rows = {}
    for name in (NAMES.get(m, m) for m in JUDGED if m not in GAINS):
        rows[name] = {"base": f"{results[f'base/{name}']:.3f}"}
        for arm in TEXT_ARMS[1:]:
            for what, title in (("change", "all items"), ("new_items", "new items")):
                if (key := f"{arm}/{name}_{what}") in results:
                    rows[name][f"{arm}, {title}"] = stats.bracketed(results, key, "+.3f")
    return pd.DataFrame.from_dict(rows, orient="index").fillna("")


def gain_kept(
    explanations: pd.DataFrame, n_boot: int, rng: np.random.Generator
) -> dict[str, float]:
    """Share of the unshielded gain in reward that the shielded policy has, users resampled jointly: ``shielded/gain_kept``.

    Empty where the unshielded gain is not above 0 in every resample: a share of nothing means nothing.
    """
    base, free, held = (
        explanations.loc[explanations["arm"] == arm, "reward"].to_numpy(float) for arm in TEXT_ARMS
    )
    if free.mean() <= base.mean():
        return {}
    try:
        return _with_ends(
            "shielded/gain_kept", stats.bootstrap_ratio(held - base, free - base, n_boot, rng)
        )
    except ValueError:
        return {}


def _with_ends(name: str, found: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip((name, f"{name}_lo", f"{name}_hi"), map(float, found), strict=True))


def group_metrics(
    arm: str, explanations: pd.DataFrame, n_boot: int, rng: np.random.Generator
) -> dict[str, float]:
    """Gains over the base on films that PPO explained to others (``…_seen_items``) and never did (``…_new_items``)."""
    said, base = (explanations[explanations["arm"] == a] for a in (arm, "base"))
    out = {}
    for what, keep in (
        ("seen_items", ~base["new_item"].to_numpy()),
        ("new_items", base["new_item"].to_numpy()),
    ):
        out |= gain_metrics(arm, said[keep], base[keep], what, n_boot, rng)
    return out


def added_by_ppo(
    arm: str, explanations: pd.DataFrame, n_boot: int, rng: np.random.Generator
) -> dict[str, float]:
    """Gains over the same arm as it was after the warm start, before PPO: ``…_by_ppo``; empty if it was not judged."""
    warm = explanations[explanations["arm"] == f"{arm}_warm"]
    return gain_metrics(
        arm, explanations[explanations["arm"] == arm].iloc[: len(warm)], warm, "by_ppo", n_boot, rng
    )


def tests(
    explanations: pd.DataFrame, ranking: pd.DataFrame, n_boot: int, rng: np.random.Generator
) -> pd.DataFrame:
    """One row an arm and question: difference to the base, its p (paired bootstrap), and p after Holm's correction
    over all the rows."""
    rows = []
    for arm in TEXT_ARMS[1:]:
        for table, name in (
            (explanations, "reward"),
            (explanations, "quality"),
            (explanations, "click"),
            (ranking, "ndcg"),
        ):
            a, b = (table.loc[table["arm"] == which, name].to_numpy() for which in (arm, "base"))
            difference, _, _, p = stats.paired_bootstrap_diff(a, b, n_boot, rng)
            rows.append({"arm": arm, "measure": name, "difference": difference, "p": p})
    frame = pd.DataFrame(rows)
    return frame.assign(p_holm=stats.holm(frame["p"].to_numpy()))


def detectable(explanations: pd.DataFrame, arm: str = "shielded") -> pd.DataFrame:
    """Per profile: the smallest gain in reward, quality and CTR lift that its ``eval_users`` show with power .8.

    The spread of the paired differences is this run's.
    """
    said, base = (explanations[explanations["arm"] == a] for a in (arm, "base"))
    spread = {name: (said[name].to_numpy() - base[name].to_numpy()).std(ddof=1) for name in GAINS}
    spread["ctr_lift"] = stats.ratio_influence(
        said["click"].to_numpy(), base["click"].to_numpy()
    ).std(ddof=1)
    users = {profile: resolve(profile).eval_users for profile in PROFILES}
    return pd.DataFrame(
        [
            {
                "profile": profile,
                "users": n,
                **{name: stats.minimum_detectable(std, n) for name, std in spread.items()},
            }
            for profile, n in users.items()
        ]
    )


def arm_metrics(
    arm: str,
    explanations: pd.DataFrame,
    ranking: pd.DataFrame,
    change: dict[str, float],
    n_boot: int,
    rng: np.random.Generator,
) -> dict[str, float]:
    """An arm's reward, clicks and ranking for ``metrics/evaluation.json``, keyed ``<arm>/<name>``; intervals over users."""
    said = explanations[explanations["arm"] == ("unshielded" if arm == "separate" else arm)]
    base = explanations[explanations["arm"] == "base"]
    ranked, before = ranking[ranking["arm"] == arm], ranking[ranking["arm"] == "base"]
    out: dict[str, float] = {}
    for name, values in (
        ("reward", said["reward"]),
        ("quality", said["quality"]),
        ("ndcg@10", ranked["ndcg"]),
    ):
        out |= _with_ends(name, stats.bootstrap_mean(values.to_numpy(), n_boot, rng))
    for name, after_, before_ in (
        ("reward_change", said["reward"], base["reward"]),
        ("quality_change", said["quality"], base["quality"]),
        ("ndcg@10_change", ranked["ndcg"], before["ndcg"]),
    ):
        out |= _with_ends(
            name, stats.bootstrap_mean(after_.to_numpy() - before_.to_numpy(), n_boot, rng)
        )
    for name, measure in CHURN.items():
        out |= _with_ends(name, stats.bootstrap_mean(ranked[measure].to_numpy(), n_boot, rng))
    clicks = said["click"].to_numpy(), base["click"].to_numpy()
    out |= _with_ends("ctr_lift", ctr_lift(*clicks, n_boot, rng))
    _, out["ctr_lift_bca_lo"], out["ctr_lift_bca_hi"] = stats.bootstrap_ratio(
        *clicks, n_boot, rng, method="bca"
    )
    out |= {
        "ctr": said["click"].mean(),
        "kl": said["kl"].mean(),
        "eos_rate": said["ended"].mean(),
        "mean_tokens": said["tokens"].mean(),
        **{
            name: said[name].mean()
            for name in ("reward_length", "reward_relevance", "reward_coherence")
        },
        "hr@10": ranked["hr"].mean(),
        **change,
    }
    return {f"{arm}/{name}": float(value) for name, value in out.items()}


def ranking_gain_table(results: dict[str, float], arms: Sequence[str]) -> pd.DataFrame:
    """What became of the ranking, as text with intervals over users: a row an arm."""
    shown = {"NDCG@10, change": "ndcg@10_change", **{name: name for name in CHURN}}
    return pd.DataFrame(
        {
            title: {arm: stats.bracketed(results, f"{arm}/{name}", ".4f") for arm in arms}
            for title, name in shown.items()
        }
    )
