import math

import numpy as np
import pytest

from recrl_lib.evaluation.clicks import ClickModel, standardised_score
from recrl_lib.params import resolve


def test_probability_by_hand_and_a_model_of_parameters():
    model = ClickModel(alpha=0.5, beta=2.0, bias=-1.0, user_std=0.7, position_weight=0.4)
    p = model.probabilities([1.0, -2.0], [0.25, 1.0], [1, 3], np.array([0.0, 1.0]))
    logits = [-1 + 0.5 + 0.5 + 0.4, -1 - 1 + 2 + 0.7 + 0.4 / 2]
    assert p == pytest.approx([1 / (1 + math.exp(-logit)) for logit in logits])
    params = resolve("smoke", sim_beta=3.0, sim_position=0.1)
    model = ClickModel.of(params)
    assert (model.beta, model.position_weight, model.alpha) == (3.0, 0.1, params.sim_alpha)


def test_standardised_score_against_a_plain_loop():
    rng = np.random.default_rng(3)
    scores = rng.normal(5, 3, (6, 9))
    scores[:, 0] = scores[1, 4:7] = -np.inf  # padding, and what user 1 has seen
    items, wanted = np.array([1, 2, 3, 4, 5, 8]), []
    for row, item in zip(scores, items, strict=True):
        kept = row[np.isfinite(row)]
        wanted.append((row[item] - kept.mean()) / kept.std())
    assert standardised_score(scores, items) == pytest.approx(wanted)
    assert standardised_score(2 * scores + 7, items) == pytest.approx(wanted)
    assert standardised_score(np.full((1, 4), 3.0), np.array([1])) == pytest.approx([0])
    with pytest.raises(ValueError, match="masked"):
        standardised_score(scores, np.zeros(6, int))


@pytest.mark.parametrize("given", [(np.nan, 0, 1), (0, 1.2, 1), (0, np.nan, 1), (0, 0, 0)])
def test_numbers_out_of_range_are_refused(given):
    columns = ([0.5, value] for value in given)
    with pytest.raises(ValueError, match="scores finite, quality in .0, 1., positions from 1"):
        ClickModel.of(resolve("smoke")).probabilities(*columns, np.zeros(2))
