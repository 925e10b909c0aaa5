import pandas as pd
import pytest
import torch

from recrl_lib.params import resolve
from recrl_lib.tests.training.test_ppo import trainer
from recrl_lib.training import diagnostics

HEALTHY = dict(
    reward=0.8,
    kl=1.0,
    eos_rate=0.95,
    entropy=1.0,
    explained_variance=0.1,
    clip_fraction=0.03,
    length=30.0,
    gradient_norm=0.1,
    replay_norm=0.0,
    shield_seconds=0.01,
    step_seconds=4.0,
)


def rows(n: int = 6, **last) -> pd.DataFrame:
    """``n`` healthy steps, the last two with other values."""
    table = pd.DataFrame([{"step": k, "episodes": 32 * k, **HEALTHY} for k in range(1, n + 1)])
    for name, value in last.items():
        table.loc[n - 2 :, name] = value
    return table


def test_nothing_to_warn_of():
    assert diagnostics.warnings(rows()) == [] == diagnostics.warnings(rows(1))
    assert (
        diagnostics.warnings(
            rows().drop(
                columns=[
                    "entropy",
                    "explained_variance",
                    "clip_fraction",
                    "gradient_norm",
                    "replay_norm",
                ]
            )
        )
        == []
    )


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("kl", 25.0, "KL reached 25.0 nats per text at step 5"),
        ("eos_rate", 0.75, "fell by 0.20"),
        ("eos_rate", 0.5, "50% of the latest texts are cut off"),
        ("entropy", 0.1, "collapsed to 10%"),
        ("explained_variance", -3.0, "value_lr"),
        ("clip_fraction", 0.4, "40% of the ratios"),
        ("replay_norm", 0.3, "3.0 times the reward's: lower shield_penalty"),
    ],
)
def test_each_warning_fires(name, value, words):
    assert any(words in text for text in diagnostics.warnings(rows(**{name: value})))


def test_every_statistic_of_a_step_is_explained_and_every_explained_one_is_logged():
    logged = {
        "reward_<part>" if name.startswith("reward_") else name for name in trainer().step()
    } - {"step", "episodes"}
    assert logged == set(diagnostics.STATISTICS)
    assert set(diagnostics.TIMES) < logged and all(all(s) for s in diagnostics.STATISTICS.values())


def test_summary_by_hand_with_and_without_what_trl_does_not_report():
    table = rows(reward=0.9)
    found = diagnostics.summary(table)
    assert (found["steps"], found["episodes"], found["reward_first"], found["reward_last"]) == (
        6,
        192,
        0.8,
        0.9,
    )
    assert found["ratio_first_minibatch_max_dev"] == 0 and found[
        "generated_tokens_per_second"
    ] == pytest.approx(30 * 32 / 4)
    found = diagnostics.summary(
        table.assign(
            ratio_first_minibatch_max_dev=[0, 0, 3e-5, 0, 0, 0], generated_tokens_per_second=100.0
        )
    )
    assert (
        found["ratio_first_minibatch_max_dev"] == 3e-5
        and found["generated_tokens_per_second"] == 100
    )


def test_precision_is_bfloat16_where_asked_and_on_cuda():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    got = [
        diagnostics.autocasts(resolve("smoke", dtype=d), device)
        for d in ("auto", "float32", "bfloat16")
        for device in (cpu, cuda)
    ]
    assert got == [False, True, False, False, True, True]
    assert diagnostics.ratio_tolerance(resolve("smoke"), cpu) < diagnostics.ratio_tolerance(
        resolve("smoke"), cuda
    )
