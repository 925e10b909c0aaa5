"""Parameters: types, ranges, profiles, and that every one belongs to exactly one stage."""

from dataclasses import fields

import pytest

from recrl_lib.params import (
    COMMON,
    PROFILES,
    STAGES,
    Params,
    names,
    owned_by,
    parse_value,
    resolve,
    stage_named,
)


def test_defaults_are_the_smoke_profile():
    assert resolve("smoke") == Params()


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_is_valid_and_changes_only_known_parameters(profile):
    params = resolve(profile, run="x", seed=3)
    expected = {**Params().as_dict(), **PROFILES[profile], "run": "x", "seed": 3}
    assert params.as_dict() == expected


def test_every_parameter_has_a_stage_a_help_text_and_a_value_of_its_type():
    stages = {stage.name for stage in STAGES} | {COMMON}
    for field in fields(Params):
        assert field.metadata["stage"] in stages, field.name
        assert field.metadata["help"], field.name
        assert type(getattr(Params(), field.name)) is field.type, field.name


def test_stages_own_all_parameters_and_share_only_the_common_ones():
    common = owned_by(COMMON)
    own = [name for stage in STAGES for name in owned_by(stage.name) if name not in common]
    assert sorted(own + common) == sorted(names())
    assert common == ["run", "seed", "device"]


@pytest.mark.parametrize(
    "name, value",
    [("lr_schedule", "linear"), ("kl_target", 5.0), ("stop_kl", 0.1), ("dtype", "bfloat16")],
)
def test_what_trl_is_not_told_is_refused_with_it(name, value):
    Params(**{name: value})
    with pytest.raises(ValueError, match=f"{name}=.*'rloo'"):
        Params(algorithm="rloo", **{name: value})


def test_stages_need_only_earlier_stages():
    for i, stage in enumerate(STAGES):
        assert set(stage.needs) <= {earlier.name for earlier in STAGES[:i]}, stage.name


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"seed": "1"}, ["seed", "int", "str"]),
        ({"seed": True}, ["seed", "int", "bool"]),
        ({"seed": -1}, ["seed", "at least 0"]),
        ({"ppo_users": 0.95}, ["ppo_users", "at most 0.9"]),
        ({"ranker_epochs": 1.0}, ["ranker_epochs", "int", "float"]),
        ({"device": "tpu"}, ["device", "'auto'", "'cuda'"]),
        ({"run": "../x"}, ["run"]),
        ({"run": ""}, ["run"]),
        ({"run": "reference"}, ["reference", "published"]),
        ({"ranker_dim": 33}, ["ranker_dim", "ranker_heads"]),
        ({"minibatches": 3}, ["minibatches", "16"]),
        ({"shield_mode": "penalty"}, ["shield_penalty", "weight"]),
        ({"shield_settle": 5}, ["shield_settle", "shield_penalty"]),
    ],
)
def test_bad_values_are_refused_by_name(wrong, words):
    with pytest.raises(ValueError) as error:
        Params(**wrong)
    assert all(word in str(error.value) for word in words), error.value


def test_an_int_serves_as_a_float_and_is_stored_as_one():
    assert type(Params(kl_coef=1).kl_coef) is float


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(
        ValueError, match="unknown parameter 'sheild_rank'; did you mean shield_rank"
    ):
        resolve("smoke", sheild_rank=3)
    with pytest.raises(ValueError, match="unknown profile 'big'"):
        resolve("big")
    with pytest.raises(ValueError, match="no stage is called 'rank'"):
        stage_named("rank")


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("seed", "7", 7),
        ("kl_coef", "1e-4", 1e-4),
        ("interactive", "True", True),
        ("interactive", "false", False),
        ("llm", "a/b", "a/b"),
    ],
)
def test_values_from_a_command_line_get_their_type(name, text, value):
    parsed = parse_value(name, text)
    assert parsed == value and type(parsed) is type(value)


@pytest.mark.parametrize("name, text", [("seed", "1.5"), ("interactive", "1"), ("kl_coef", "much")])
def test_values_of_the_wrong_type_are_refused(name, text):
    with pytest.raises(ValueError, match=name):
        parse_value(name, text)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_must_be_finite(value):
    with pytest.raises(ValueError, match="learning_rate.*finite"):
        Params(learning_rate=value)
