"""A whole run of the toy study on disk, its numbers made as notebooks make them."""

import pandas as pd
import pytest
import torch

from recrl_lib import measures, runs, study
from recrl_lib.evaluation import conversations, ranking_change, results
from recrl_lib.evaluation.clicks import ClickModel
from recrl_lib.explainer.item_texts import ItemTexts
from recrl_lib.explainer.sampling import explain
from recrl_lib.params import Params
from recrl_lib.pipeline import verify
from recrl_lib.ranker import sasrec
from recrl_lib.scoring import reward
from recrl_lib.shield import projection, subspaces
from recrl_lib.tests.evaluation.toy import toy_study
from recrl_lib.tests.tiny import BagOfWords, tune_randomly

PARAMS = Params(run="r", seed=2, eval_users=12, bootstrap=200, max_new_tokens=8, temperature=1.0)


def start(name: str, params: Params = PARAMS) -> runs.StageRun:
    return runs.start(name, params.as_dict())


def finish(stage: runs.StageRun, made: study.Study | None = None) -> None:
    """Finish ``stage``: what is computed from its artifacts, and .5 for what else it must have."""
    rows = []
    if made:
        tables = verify.RECOMPUTED[stage.name](verify.Finished(stage, made, BagOfWords()))
        rows = [row.dropna().to_dict() for table in tables for _, row in table.iterrows()]
        stage.results(rows)
    for lacking in measures.missing(stage.name, map(measures.parsed, rows)):
        name, _, arm = lacking.partition(" of ")
        arms = [arm] if arm else measures.REQUIRED_ARMS.get(stage.name, [""])
        stage.results({"measure": name, "value": 0.5, "arm": arm} for arm in arms)
    stage.finish()


def prepare(made: study.Study, params: Params = PARAMS) -> None:
    """Stages data, ranker and explainer of the toy study."""
    seen = [[*history, last] for history, last in zip(made.split.with_valid, made.split.test)]
    rows = [(u, i, 100 * t) for u, items in enumerate(seen) for t, i in enumerate(items)]
    stage = start("data", params)
    stage.save_json("dataset", {"noun": "film"})
    stage.save_table("interactions", pd.DataFrame(rows, columns=["user", "item", "time"]))
    stage.save_table("items", made.items)
    stage.save_table("users", made.users)
    groups = {g: getattr(made, f"{g}_users") for g in ("ppo", "validation", "heldout")}
    stage.save_json("user_groups", {name: users.tolist() for name, users in groups.items()})
    finish(stage, made)
    stage = start("ranker", params)
    sasrec.save(made.ranker, stage.output("ranker.safetensors"))
    stage.save_tensors("base", {"top": torch.from_numpy(made.top), "text": made.text})
    stage.save_json("ranker_hashes", {"weights": sasrec.state_sha256(made.ranker), "scores": ""})
    stage.curve([{"epoch": 1, "valid_ndcg@10": 0.25}])
    finish(stage, made)
    finish(start("explainer", params))


def tune(explainer, reader: ItemTexts, made: study.Study) -> dict[str, dict]:
    """Stages shield and shielded_ppo; each arm's adapter."""
    protected = subspaces.protect(subspaces.item_grams(explainer, reader)[0], energy=0.9)
    stage = start("shield")
    stage.save_tensors("subspaces", subspaces.to_tensors(protected))
    stage.save_json("held_out_items", [3, 7, 8, 20])
    table = pd.DataFrame({"rank": [s.rank for s in protected.values()], "overlap": 0.5})
    stage.save_table("overlap", table)
    finish(stage, made)
    stage, adapters = start("shielded_ppo"), {}
    names = (
        "step episodes length reward kl eos_rate clip_fraction shield_seconds step_seconds "
        "ratio_first_minibatch_max_dev generated_tokens_per_second"
    ).split()
    steps = [dict.fromkeys(names, k + 1) for k in range(2)]
    stage.curve([{"arm": arm} | step for arm in measures.ARMS[2:] for step in steps])
    for seed, arm in enumerate(measures.ARMS[2:]):
        tune_randomly(explainer, 0.1, seed)
        if arm == "shielded":
            projection.Shield(explainer, protected).project_parameters()
        adapters[arm] = explainer.adapter_state()
        stage.save_tensors(f"adapter_{arm}", adapters[arm])
        leak = pytest.approx(projection.leak(explainer, protected), rel=1e-4, abs=1e-7)
        assert verify.adapter_leak(adapters[arm], protected) == leak
    finish(stage, made)
    return adapters


def evaluate(explainer, reader: ItemTexts, adapters: dict[str, dict]) -> None:
    """Stages evaluation and audit, with the artifacts that their notebooks write."""
    stage = start("evaluation")
    made = study.load(stage)
    records = made.heldout_records(12, stage.rng("evaluation records"))
    rewarder = reward.Reward.of(PARAMS, made.catalogue)
    scorer = results.Scorer(made, records, rewarder, BagOfWords(), stage.torch_seed("said"))
    with explainer.reference():
        said = [scorer.explain("base", explainer, PARAMS)]
    vectors = {"base": made.text, "separate": made.text}
    for arm, adapter in adapters.items():
        explainer.load_adapter(adapter)
        vectors[arm] = reader.vectors()
        said.append(scorer.explain(arm, explainer, PARAMS))
        halved = {name: x / 2 for name, x in adapter.items()}  # a policy of its own to set out from
        explainer.load_adapter(halved)
        said.append(scorer.explain(f"{arm}_warm", explainer, PARAMS, 5))
    said.append(scorer.controls(explainer, 1.0, 4))
    tables = {arm: ranking_change.ranking_table(made, text) for arm, text in vectors.items()}
    ranking = pd.concat([table.assign(arm=arm) for arm, (table, _) in tables.items()])
    tops = ranking_change.top_frame({arm: top for arm, (_, top) in tables.items()})
    texts = results.click_table(
        made, pd.concat(said, ignore_index=True), ClickModel.of(PARAMS), stage.rng("clicks")
    )[0]
    spoken = texts["arm"].isin(results.TEXT_ARMS)
    talks = []
    for arm in results.TEXT_ARMS:
        explainer.load_adapter(adapters.get(arm, explainer.adapter_state()))
        first = texts.loc[texts["arm"] == arm, "text"].tolist()[:3]

        def say(asked, turn):
            return explain(explainer, asked, 6, 1.0, 0)

        talk = conversations.converse(made, records[:3], first, say, PARAMS.seed)
        talks.append(talk.assign(arm=arm))
    artifacts = {"explanations": texts[spoken], "other_texts": texts[~spoken]}
    artifacts["conversations"] = pd.concat(talks)
    for name, table in (artifacts | {"ranking": ranking, "top10": tops}).items():
        stage.save_table(name, table.reset_index(drop=True))
    finish(stage, made)
    finish(start("audit"), made)


def build() -> None:
    """Run ``r`` below ``paths.RUNS``."""
    made, explainer = toy_study()
    prepare(made)
    reader = ItemTexts(explainer, made.items["text"].tolist())
    evaluate(explainer, reader, tune(explainer, reader, made))
