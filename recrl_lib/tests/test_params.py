"""Parameters: one model a stage, profiles, and errors that name parameter, value and remedy."""

import pytest

from recrl_lib import data, params
from recrl_lib.params import PROFILES, STAGES, Params, owned_by, parse_value, resolve
from recrl_lib.scoring import reward
from recrl_lib.shield import projection


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_is_valid_and_changes_only_known_parameters(profile):
    expected = {**Params().as_dict(), **PROFILES[profile], "run": "x", "seed": 3}
    assert resolve(profile, run="x", seed=3).as_dict() == expected


def test_stages_share_only_the_common_parameters_and_need_only_earlier_stages():
    common = owned_by("environment")
    own = [name for stage in STAGES for name in owned_by(stage.name) if name not in common]
    assert common + own == list(Params().as_dict())
    assert common == ["run", "seed", "device"]
    for i, stage in enumerate(STAGES):
        assert set(stage.needs) <= {earlier.name for earlier in STAGES[:i]}, stage.name


def test_every_choice_is_implemented():
    implemented = {
        "dataset": data.FORMATS, "reward": reward.VARIANTS, "shield_mode": projection.MODES,
    }  # fmt: skip
    for name, found in implemented.items():
        assert set(params.choices(name)) <= set(found), name


def test_the_parameters_cell_holds_defaults_help_and_choices():
    lines = params.parameters_cell("explore").splitlines()
    assert lines[0] == 'run = "smoke"  # name of the run folder under runs/'
    assert lines[2] == 'device = "auto"  # where models run (auto | cpu | cuda)'
    assert lines[-1].startswith("interactive = False  # show")
    for stage in STAGES:
        declared: dict = {}
        exec(params.parameters_cell(stage.name), {}, declared)
        assert declared == {name: getattr(Params(), name) for name in owned_by(stage.name)}


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"seed": "1"}, "parameter seed='1': must be a valid integer"),
        ({"seed": True}, "parameter seed=True: must be a valid integer"),
        ({"kl_coef": "3e-4"}, "parameter kl_coef='3e-4': must be a valid number"),
        ({"ppo_users": 0.95}, "parameter ppo_users=0.95: must be less than or equal to 0.9"),
        ({"ranker_epochs": 1.0}, "parameter ranker_epochs=1.0: must be a valid integer"),
        ({"learning_rate": float("nan")}, "parameter learning_rate=nan: must be a finite number"),
        ({"device": "tpu"}, "parameter device='tpu': must be 'auto', 'cpu' or 'cuda'"),
        ({"run": "x\n"}, r"parameter run='x.n': must match pattern"),
        ({"batch": "a/b"}, "parameter batch='a/b': must match pattern"),
        ({"run": "reference"}, "parameter run='reference': that folder holds the published"),
        ({"ranker_dim": 33}, "parameter ranker_dim=33: must be a multiple of ranker_heads=2"),
        ({"minibatches": 3}, "parameter minibatches=3: must divide prompts_per_step=4"),
        ({"processes": 3}, "parameter processes=3: must divide prompts_per_step=4"),
        ({"shield_mode": "penalty"}, "parameter shield_penalty=0.0: .* give it a weight"),
        ({"shield_replay_steps": 5}, "parameter shield_replay_steps=5: .* shield_penalty"),
        ({"weight_form": 0.0, "weight_faithfulness": 0.0}, "weight_form=0.0: .* must be above 0"),
        ({"sheild_rank": 3}, "unknown parameter 'sheild_rank'; did you mean shield_rank"),
        *(
            ({"algorithm": "rloo", name: value}, f"algorithm='rloo': .*{name}")
            for name, value in (("lr_schedule", "linear"), ("kl_target", 5.0), ("processes", 2))
        ),
        ({"algorithm": "grpo", "stop_kl": 0.1}, "algorithm='grpo': .*stop_kl"),
        ({"algorithm": "rloo", "dtype": "bfloat16"}, "'bfloat16': 'rloo' trains in float32"),
    ],
)
def test_bad_values_are_refused_by_name(wrong, message):
    with pytest.raises(ValueError, match=message) as error:
        Params(**wrong)
    assert "\n" not in str(error.value)


def test_parameters_are_smoke_by_default_frozen_and_replaced_with_validation():
    assert resolve("smoke") == Params() == Params(**Params().as_dict())
    changed = Params().replace(kl_coef=1)
    assert type(changed.kl_coef) is float and Params().kl_coef != 1  # an int serves as a float
    with pytest.raises(ValueError, match="frozen"):
        changed.kl_coef = 1.0
    with pytest.raises(ValueError, match="kl_coef=-1.0: must be greater than or equal"):
        changed.replace(kl_coef=-1.0)


def test_unknown_profiles_and_stages_are_refused_with_those_there_are():
    with pytest.raises(ValueError, match="unknown profile 'big'; choose one of smoke, laptop"):
        resolve("big", sheild_rank=3)
    with pytest.raises(ValueError, match="no stage is called 'rank'; stages: environment, data"):
        params.stage_named("rank")


def test_values_from_a_command_line_get_their_type_or_are_refused():
    texts = {"seed": "7", "kl_coef": "1e-4", "interactive": "true", "llm": "a/b"}
    found = [parse_value(name, text) for name, text in texts.items()]
    assert found == [7, 1e-4, True, "a/b"] and found[2] is True
    assert parse_value("interactive", "False") is False
    for name, text in (("seed", "1.5"), ("interactive", "1"), ("kl_coef", "much")):
        with pytest.raises(ValueError, match=f"{name}={text!r} is not"):
            parse_value(name, text)
