"""Verification: an intact run passes, and every kind of change by one per cent is named."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from recrl_lib import paths, runs, study
from recrl_lib.data import splits
from recrl_lib.evaluation import audit, ranking_change
from recrl_lib.evaluation.clicks import ClickModel
from recrl_lib.evaluation.results import arm_metrics, click_table, judge_metrics
from recrl_lib.evaluation.results import panel as panel_results
from recrl_lib.explainer.item_texts import ItemTexts
from recrl_lib.params import Params
from recrl_lib.pipeline import verify
from recrl_lib.ranker import metrics, sasrec
from recrl_lib.ranker.ranking import target_ranks, top_k
from recrl_lib.runs import write_atomic
from recrl_lib.scoring import reward
from recrl_lib.shield import projection, subspaces
from recrl_lib.tests.conftest import House
from recrl_lib.tests.tiny import WORDS, BagOfWords, tiny_explainer, tune_randomly
from recrl_lib.training import diagnostics

PARAMS = Params(run="r", seed=2, eval_users=12, bootstrap=400, max_new_tokens=8, temperature=1.0)
USERS, ITEMS = 20, 30


def start(name):
    return runs.start(name, PARAMS.as_dict())


def fill(stage, **values):
    """Finish ``stage`` with ``values``, and .5 for what its metrics file must have besides."""
    stage.metrics(
        {key: 0.5 for key in runs.REQUIRED_METRICS[runs.metrics_name(stage.name)]} | values
    )
    stage.finish()


def build():
    """A finished run of a random 3-layer model on random films: every number is made as the notebooks make it."""
    rng = np.random.default_rng(0)
    titles = [" ".join(rng.choice(WORDS, 3, replace=False)).title() for _ in range(ITEMS)]
    facts = {
        "title": titles,
        "year": 1990,
        "genres": "Drama|Comedy",
        "text": [t.lower() for t in titles],
    }
    items = pd.DataFrame({"item": np.arange(1, ITEMS + 1), **facts})
    users = pd.DataFrame({"user": range(USERS), "gender": ["F", "M"] * (USERS // 2), "age": 30})
    rows = [
        (u, i, 100 * t)
        for u in range(USERS)
        for t, i in enumerate(rng.permutation(np.arange(1, ITEMS + 1))[:10])
    ]
    stage = start("data")
    stage.save_json("dataset", {"noun": "film"})
    for name, table in (
        ("interactions", pd.DataFrame(rows, columns=["user", "item", "time"])),
        ("items", items),
        ("users", users),
    ):
        stage.save_table(name, table)
    stage.save_json(
        "user_groups",
        {"ppo": list(range(6)), "validation": [18, 19], "heldout": list(range(6, 18))},
    )
    fill(
        stage,
        n_users=USERS,
        n_items=ITEMS,
        n_interactions=len(rows),
        n_ppo_users=6,
        n_validation_users=2,
        n_heldout_users=12,
        source="toy",
        sha256="0",
    )

    llm = tiny_explainer(lora_layers=1)
    reader = ItemTexts(llm, items["text"].tolist())
    text = reader.base_vectors()
    model = sasrec.SASRec(ITEMS, 16, 1, 2, 10, 0.0, text_dim=text.shape[1])
    model.fit_text(text)
    sasrec.freeze(model)
    stage = start("ranker")
    split = splits.split_leave_one_out(stage.load_table("interactions"), USERS)
    ranks = {t is None: target_ranks(model, split.with_valid, split.test, t) for t in (text, None)}
    sasrec.save(model, stage.output("ranker.safetensors"))
    stage.save_tensors(
        "base", {"top": torch.from_numpy(top_k(model, split.with_valid, text, 10)), "text": text}
    )
    stage.save_json("ranker_hashes", {"weights": sasrec.state_sha256(model), "scores": ""})
    stage.curve([{"epoch": 1, "valid_ndcg@10": 0.25}])
    functions = {"ndcg@10": metrics.ndcg_at, "hr@10": metrics.hr_at, "mrr@10": metrics.mrr_at}
    found = {name: float(function(ranks[False], 10).mean()) for name, function in functions.items()}
    bare = float(metrics.ndcg_at(ranks[True], 10).mean())
    fill(
        stage,
        **found,
        **{
            "text_free_ndcg@10": bare,
            "valid_ndcg@10": 0.25,
            "epochs": 1,
            "weights_sha256": sasrec.state_sha256(model),
        },
    )
    fill(start("explainer"))

    protected = subspaces.subspaces(subspaces.item_grams(llm, reader)[0], 0.9)
    stage = start("shield")
    stage.save_tensors("subspaces", subspaces.to_tensors(protected))
    overlap = pd.DataFrame(
        [{"rank": s.rank, "width": s.width, "overlap": 0.5} for s in protected.values()]
    )
    stage.save_table("overlap", overlap)
    left = float((1 - overlap["rank"] / overlap["width"]).mean())
    energy = float(np.mean([s.energy for s in protected.values()]))
    ranks = {"rank_mean": float(overlap["rank"].mean()), "rank_max": int(overlap["rank"].max())}
    fill(stage, energy=energy, capacity_left_mean=left, overlap_mean=0.5, **ranks)

    stage, adapters = start("shielded_ppo"), {}
    names = "step episodes length reward kl eos_rate clip_fraction ratio_first_minibatch_max_dev shield_seconds step_seconds".split()
    names.append("generated_tokens_per_second")
    curve = pd.DataFrame(
        [
            {"arm": a, **{n: k + 1 for n in names}}
            for a in ("unshielded", "shielded")
            for k in range(2)
        ]
    )
    stage.curve(curve.to_dict("records"))
    values = {}
    for seed, arm in enumerate(("unshielded", "shielded")):
        tune_randomly(llm, 0.1, seed)
        if arm == "shielded":
            projection.Shield(llm, protected).project_parameters()
        adapters[arm] = llm.adapter_state()
        stage.save_tensors(f"adapter_{arm}", adapters[arm])
        summary = diagnostics.summary(curve[curve["arm"] == arm]) | {
            "leak": projection.leak(llm, protected)
        }
        values |= {f"{arm}/{name}": value for name, value in summary.items()} | summary
    fill(stage, **values)

    stage = start("evaluation")
    world = study.load(stage)
    vectors, said = {"base": text, "separate": text}, []
    records = world.heldout_records(12, stage.rng("evaluation records"))
    panel = panel_results(
        world,
        records,
        reward.Reward.of(PARAMS, world.catalogue),
        BagOfWords(),
        stage.torch_seed("said"),
    )
    with llm.reference():
        said.append(panel.explain("base", llm, PARAMS))
    for arm, adapter in adapters.items():
        llm.load_adapter(adapter)
        vectors[arm] = reader.vectors()
        said.append(panel.explain(arm, llm, PARAMS))
    tables, tops = zip(*(ranking_change.ranking_table(world, vectors[arm]) for arm in runs.ARMS))
    ranking = pd.concat(
        [table.assign(arm=arm) for arm, table in zip(runs.ARMS, tables)], ignore_index=True
    )
    clicks = ClickModel(
        PARAMS.sim_alpha, PARAMS.sim_beta, PARAMS.sim_bias, PARAMS.sim_user_std, PARAMS.sim_position
    )
    explanations, _, _ = click_table(
        world, pd.concat(said, ignore_index=True), clicks, stage.rng("clicks")
    )
    results = {}
    for arm in runs.ARMS:
        change = {"max_abs_score_delta": 0.0}
        results |= arm_metrics(
            arm, explanations, ranking, change, PARAMS.bootstrap, stage.rng("bootstrap")
        )
        part = explanations[explanations["arm"] == ("unshielded" if arm == "separate" else arm)]
        results |= judge_metrics(arm, part, records, world.catalogue)
    lists = ranking_change.top_frame(dict(zip(runs.ARMS, tops)))
    for name, table in (("explanations", explanations), ("ranking", ranking), ("top10", lists)):
        stage.save_table(name, table)
    fill(stage, **results)

    stage = start("audit")
    mine = explanations[explanations["arm"] == "shielded"]
    about = world.records(mine["user"], mine["position"])
    fill(
        stage,
        **audit.audit(
            mine["text"].tolist(),
            about,
            world.users,
            tops[0],
            tops[3],
            ITEMS,
            mine["quality"].to_numpy(),
        ),
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory, finished):
    house = House(tmp_path_factory.mktemp("verify"))
    shutil.copytree(finished.notebooks, house.notebooks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "NOTEBOOKS", house.notebooks)
        patch.setattr(paths, "RUNS", house.runs)
        build()
    torch.use_deterministic_algorithms(False)
    return house


@pytest.fixture
def run(house, built, monkeypatch):
    shutil.copytree(built.root, house.root, dirs_exist_ok=True)
    monkeypatch.setattr(paths, "REFERENCE", house.runs / "reference")
    return house.runs / "r"


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    write_atomic(path, json.dumps(content))


def test_an_intact_run_passes(run):
    checks = verify.recompute("r", BagOfWords())
    assert [c for c in checks if not c.holds] == [] and len(checks) > 100
    assert {c.name.split(":")[0] for c in checks} == set(verify.RECOMPUTED)
    assert verify.changed_files("r") == [] and verify.against_reference("r") is None
    leaks = {c.name: c.expected for c in checks if c.name.endswith("/leak")}
    assert leaks["ppo: shielded/leak"] < 1e-6 < 0.1 < leaks["ppo: unshielded/leak"]


def test_every_number_changed_by_one_per_cent_is_named(run):
    """All numbers that are recomputed, changed at once: each must be found. Zeros by a hundredth, interval ends by half a width."""
    checks = verify.recompute("r", BagOfWords())
    names = [
        c.name
        for c in checks
        if isinstance(c.stored, (int, float)) and not isinstance(c.stored, bool)
    ]
    stored = {
        file.stem: runs.read_metrics("r", file.stem) for file in (run / "metrics").glob("*.json")
    }
    for file in (run / "metrics").glob("*.json"):

        def more(content, stem=file.stem):
            for key, value in content.items():
                if f"{stem}: {key}" in names:
                    end = key.endswith(("_lo", "_hi"))
                    width = (
                        stored[stem][f"{key[:-3]}_hi"] - stored[stem][f"{key[:-3]}_lo"]
                        if end
                        else 0.0
                    )
                    content[key] = value + (
                        max(0.5 * width, 0.01) if end or value == 0 else 0.01 * abs(value)
                    )

        edit(file, more)
    found = {c.name for c in verify.recompute("r", BagOfWords()) if not c.holds}
    assert sorted(set(names) - found) == ["ppo: shielded/leak"]  # 1 % of a rounding error


def test_texts_and_verdicts_are_compared_too(run):
    edit(
        run / "metrics" / "audit.json",
        lambda m: m.update(toxicity_mean_ok=not m["toxicity_mean_ok"]),
    )
    edit(run / "metrics" / "ranker.json", lambda m: m.update(weights_sha256="0"))
    edit(run / "metrics" / "data.json", lambda m: m.pop("n_ppo_users"))
    wrong = [c.name for c in verify.recompute("r", BagOfWords()) if not c.holds]
    assert wrong == ["data: n_ppo_users", "ranker: weights_sha256", "audit: toxicity_mean_ok"]


def test_the_command_names_what_changed_and_fails(run, monkeypatch, capsys):
    monkeypatch.setattr(verify.judge, "SentenceEncoder", lambda folder: BagOfWords())
    monkeypatch.setattr(verify.assets, "minilm_folder", lambda: None)
    assert verify.main(["--run", "r"]) == 0
    assert "0 differ, 0 files changed" in capsys.readouterr().out.splitlines()[-1]
    edit(
        run / "metrics" / "evaluation.json",
        lambda m: m.update({"shielded/reward": m["shielded/reward"] * 1.01}),
    )
    assert verify.main(["--run", "r"]) == 1
    out = capsys.readouterr().out
    assert (
        "CHANGED runs/r/metrics/evaluation.json" in out
        and "DIFFERS evaluation: shielded/reward: stored" in out
    )
    assert "1 differ, 1 files changed" in out
    write_atomic(run / "artifacts" / "explanations.parquet", b"x")
    assert (
        verify.main(["--run", "r"]) == 1
        and "has changed since stage 'evaluation' finished" in capsys.readouterr().err
    )
    assert verify.main(["--run", "none"]) == 1 and "make all RUN=none" in capsys.readouterr().err


def test_a_published_run_with_equal_parameters_is_compared(run):
    published = run.parent / "reference" / "r"
    shutil.copytree(run, published)
    assert all(c.holds for c in verify.against_reference("r"))
    edit(
        published / "metrics" / "evaluation.json",
        lambda m: m.update({"shielded/reward": m["shielded/reward"] + 0.04}),
    )
    assert [c.name for c in verify.against_reference("r") if not c.holds] == [
        "evaluation: shielded/reward"
    ]
    other = yaml.safe_load((published / "params.yaml").read_text()) | {"ppo_steps": 99}
    write_atomic(published / "params.yaml", yaml.safe_dump(other))
    assert verify.against_reference("r") is None


def test_a_run_without_an_audit_is_verified_and_one_without_an_evaluation_refused(run):
    edit(run / "manifest.json", lambda m: m["stages"].pop("audit"))
    looked_at = {c.name.split(":")[0] for c in verify.recompute("r", BagOfWords())}
    assert verify.unfinished("r") == ["audit"] and looked_at == set(verify.RECOMPUTED) - {"audit"}
    edit(run / "manifest.json", lambda m: m["stages"].pop("evaluation"))
    with pytest.raises(RuntimeError, match="no finished evaluation: make all RUN=r"):
        verify.recompute("r", BagOfWords())
