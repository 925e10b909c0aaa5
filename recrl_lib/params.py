"""Every parameter of the study, once: name, type, default, range and help, one model a stage.

The defaults are the profile ``smoke``; ``profiles.yaml`` lists what the others change. A notebook
declares the common parameters and those its stage owns, in a cell written by ``parameters_cell``.
A stage reads the parameters of earlier stages from ``runs/<run>/params.yaml``.
"""

import re
from difflib import get_close_matches
from typing import Any, Literal, NamedTuple, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from recrl_lib import paths

TOP_K = 10  # items recommended to each user

Dataset = Literal[
    "ml-100k", "ml-25m", "ml-32m", "ml-latest-small", "amazon-books", "amazon-books-2018",
    "amazon-books-2014", "steam-200k", "csv",
]  # fmt: skip
Split = Literal["leave-one-out", "global-time"]
Algorithm = Literal["ppo", "rloo", "grpo"]
ShieldMode = Literal["gradient", "update", "frozen_a", "penalty"]
ShieldBasis = Literal["activation", "contrastive"]
Tracker = Literal["none", "wandb", "wandb-online", "tensorboard", "trackio"]


class Stage(NamedTuple):
    """One notebook: its number, its name, and the stages whose output it reads."""

    number: int
    name: str
    needs: tuple[str, ...] = ()

    @property
    def notebook(self) -> str:
        return f"{self.number:02d}_{self.name}.ipynb"


_TRAINED = ("data", "ranker", "explainer", "shield", "shielded_ppo")
_NEEDS: dict[str, tuple[str, ...]] = {
    "environment": (), "data": (), "ranker": _TRAINED[:1], "explainer": _TRAINED[:2],
    "shield": _TRAINED[:3], "shielded_ppo": _TRAINED[:4], "evaluation": _TRAINED,
    "ablations": ("evaluation",), "audit": ("data", "ranker", "evaluation"),
    "report": (*_TRAINED, "evaluation", "audit"),
    "explore": ("data", "ranker", "explainer", "shielded_ppo"),
}  # fmt: skip
STAGES = tuple(Stage(n, name, needs) for n, (name, needs) in enumerate(_NEEDS.items()))
PIPELINE = STAGES[:-1]  # what `make all` runs: all but "explore"


def stage_named(name: str) -> Stage:
    """The stage called ``name``. ``ValueError`` lists the names if there is none."""
    if name not in _NEEDS:
        raise ValueError(f"no stage is called {name!r}; stages: {', '.join(_NEEDS)}")
    return next(stage for stage in STAGES if stage.name == name)


_SHARES = r"^why=\d+( (why_not|instead|compare)=\d+)*$"


class StageParams(BaseModel):
    """Parameters of one stage: strictly typed (an int serves as a float, nothing else), frozen."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


def _p(default: Any, help: str, low: Any = None, high: Any = None, pattern: Any = None) -> Any:
    return Field(default, description=help, ge=low, le=high, pattern=pattern)


class CommonParams(StageParams):
    run: str = _p("smoke", "name of the run folder under runs/", pattern=r"^[A-Za-z0-9][\w.-]*$")
    seed: int = _p(0, "seed of everything random in the run", 0)
    device: Literal["auto", "cpu", "cuda"] = _p("auto", "where models run")


class DataParams(StageParams):
    dataset: Dataset = _p("ml-100k", "data set; csv: your own two tables")
    ppo_users: float = _p(0.5, "share of users whose prompts PPO trains on", 0.1, 0.9)
    validation_users: float = _p(0.1, "share of users to choose settings on", 0.01, 0.5)
    heldout_items: float = _p(0.2, "share of items that PPO never explains", 0.0, 0.9)
    data_dir: str = _p("", "folder with the data set's files; empty: fetch them")
    split: Split = _p("leave-one-out", "how validation and test events are held out")
    min_core: int = _p(0, "fewest events of a user and an item; 1 = all; 0 = default", 0)
    max_interactions: int = _p(0, "keep about this many of the latest; 0 = default", 0)
    bad_row_limit: float = _p(0.01, "largest share of bad rows in a file", 0.0, 1.0)
    user_column: str = _p("user", "csv: column of the user in interactions")
    item_column: str = _p("item", "csv: column of the item in interactions and in items")
    time_column: str = _p("time", "csv: column of the time; empty: file order counts")
    rating_column: str = _p("rating", "csv: column of the rating, if there is one")
    title_column: str = _p("title", "csv: column of the title in items")
    year_column: str = _p("year", "csv: column of the year in items, if there is one")
    genres_column: str = _p("genres", "csv: column of the genres in items, if there is one")


class RankerParams(StageParams):
    text: Literal["llm", "none"] = _p("llm", "item text: the LLM's vectors; none: plain SASRec")
    llm: str = _p("smollm2-135m-instruct", "packaged model, Hugging Face id or local folder")
    ranker_dim: int = _p(64, "width of the ranker", 8)
    ranker_layers: int = _p(1, "causal blocks", 1)
    ranker_heads: int = _p(2, "attention heads", 1)
    ranker_max_len: int = _p(50, "longest history read", 2)
    ranker_dropout: float = _p(0.2, "dropout", 0.0, 0.9)
    ranker_lr: float = _p(1e-3, "Adam learning rate", 0.0)
    ranker_batch: int = _p(16, "users in a batch", 1)
    ranker_epochs: int = _p(2, "most epochs", 1)
    ranker_patience: int = _p(4, "evaluations without a better NDCG@10 before stopping", 1)
    ranker_item_dropout: float = _p(0.2, "share of the history blanked in training", 0.0, 0.9)
    ranker_average: float = _p(0.99, "decay of the average of weights; 0 = none", 0.0, 1.0)
    ranker_seeds: int = _p(1, "trainings with text and without; the first is used", 1)
    cold_items: float = _p(0.1, "share of items held out for cold start; 0 = skip", 0.0, 0.5)


class ExplainerParams(StageParams):
    lora_rank: int = _p(16, "rank of the LoRA adapters (paper: 16)", 1)
    lora_alpha: int = _p(16, "LoRA alpha; the update is scaled by alpha / rank", 1)
    lora_layers: int = _p(4, "adapt the top n layers; 0 = all", 0)
    history_length: int = _p(6, "most recent titles in the prompt", 1)
    evidence: Literal["none", "order", "named"] = _p(
        "order", "of what moved the ranker, in prompts"
    )
    intents: str = _p(
        "why=3 why_not=1 instead=1 compare=1", "shares of questions in tuning", pattern=_SHARES
    )
    temperature: float = _p(1.0, "divides the logits, in every log-probability too", 0.05)
    max_new_tokens: int = _p(24, "longest explanation", 4)
    explain_users: int = _p(8, "users whose base explanations are sampled in notebook 03", 1)
    reward: Literal["faithful", "grounded", "paper"] = _p("faithful", "reward variant")
    weight_form: float = _p(0.2, "faithful reward: weight of form, rescaled to sum 1", 0.0)
    weight_faithfulness: float = _p(0.8, "faithful reward: weight of faithfulness", 0.0)


class ShieldParams(StageParams):
    shield_mode: ShieldMode = _p("update", "how the shielded arm is protected")
    shield_energy: float = _p(0.99, "share of activation energy to protect per layer", 0.0, 1.0)
    shield_rank: int = _p(0, "protect exactly this many directions; 0 = use shield_energy", 0)
    shield_basis: ShieldBasis = _p("contrastive", "which directions are protected")
    shield_penalty: float = _p(0.0, "weight of the replay penalty on item vectors", 0.0)
    shield_replay_steps: int = _p(0, "replay after training; PPO that projects has none then", 0)


class PPOParams(StageParams):
    warm_steps: int = _p(4, "supervised steps before PPO, under the arm's own shield; 0 = none", 0)
    warm_batch: int = _p(4, "explanations a warm-start step", 1)
    warm_lr: float = _p(3e-3, "AdamW rate of the warm start", 0.0)
    ppo_steps: int = _p(2, "rollout-update iterations", 1)
    prompts_per_step: int = _p(4, "different prompts in a rollout", 1)
    samples_per_prompt: int = _p(4, "explanations sampled per prompt", 1)
    ppo_epochs: int = _p(1, "passes over each rollout", 1)
    minibatches: int = _p(2, "optimizer steps per pass", 1)
    learning_rate: float = _p(2e-3, "AdamW rate of the adapters", 0.0)
    value_lr: float = _p(1e-5, "AdamW rate of the value head", 0.0)
    baseline: Literal["leave_one_out", "value"] = _p("leave_one_out", "of the advantages")
    kl_coef: float = _p(0.01, "per-token KL penalty in the reward", 0.0)
    clip_range: float = _p(0.2, "PPO clip range of the ratio", 0.0, 1.0)
    value_clip: float = _p(0.2, "clip range of the value", 0.0)
    gae_lambda: float = _p(1.0, "GAE lambda (gamma is 1)", 0.0, 1.0)
    max_grad_norm: float = _p(1.0, "gradient norm clip, before the shield", 0.0)
    missing_eos_penalty: float = _p(0.2, "subtracted from the reward of a cut-off text", 0.0)
    algorithm: Algorithm = _p("ppo", "what tunes the policy: ours, or TRL's RLOO or GRPO")
    micro_batch: int = _p(8, "texts in memory at once, at least all of a prompt", 1)
    kl_target: float = _p(0.0, "KL per text in nats to steer kl_coef to; 0 = fixed", 0.0)
    stop_kl: float = _p(0.0, "KL per token that ends a rollout's passes; 0 = never", 0.0)
    lr_schedule: Literal["constant", "linear"] = _p("constant", "learning rates over the steps")
    dtype: Literal["auto", "float32", "bfloat16"] = _p("auto", "auto: bfloat16 on CUDA")
    checkpoint_every: int = _p(1, "iterations between checkpoints", 1)
    checkpoint_keep: int = _p(2, "checkpoints kept of each arm while it trains", 1)
    processes: int = _p(1, "data-parallel processes; must divide prompts_per_step", 1)
    tracker: Tracker = _p("none", "mirrors the curves")


class EvaluationParams(StageParams):
    eval_users: int = _p(24, "held-out users whose explanations are judged", 2)
    bootstrap: int = _p(2000, "bootstrap resamples of users", 100)
    sim_alpha: float = _p(0.5, "click model: weight of the ranker's standardised score")
    sim_beta: float = _p(2.0, "click model: weight of the judge's quality")
    sim_bias: float = _p(-2.0, "click model: intercept")
    sim_position: float = _p(0.5, "click model: weight of the position's discount")
    sim_user_std: float = _p(0.5, "click model: spread of the users' own bias", 0.0)
    control_users: int = _p(6, "users with scored control texts, the first of eval_users", 2)
    warm_users: int = _p(6, "users for whom the warm-started policies speak; 0 = none", 0)
    chat_users: int = _p(3, "users who ask two follow-up questions, the first of eval_users", 1)


class AblationsParams(StageParams):
    batch: str = _p("smoke", "grid whose finished runs are compared", pattern=r"^[\w-]+$")


class ExploreParams(StageParams):
    interactive: bool = _p(False, "show the chat widget (needs a live JupyterLab)")


class Params(
    ExploreParams, AblationsParams, EvaluationParams, PPOParams, ShieldParams, ExplainerParams,
    RankerParams, DataParams, CommonParams,
):  # fmt: skip
    """All parameters, read as ``params.kl_coef``; ``ValueError`` in one line if one is bad."""

    def __init__(self, **values: Any) -> None:
        check_names(values)
        try:
            super().__init__(**values)
        except ValidationError as error:
            first = error.errors()[0]
            text = re.sub(r"^\w+ should", "must", first["msg"])
            raise ValueError(f"parameter {first['loc'][0]}={first['input']!r}: {text}") from None
        for name, holds, remedy in self._rules():
            if not holds:
                raise ValueError(f"parameter {name}={getattr(self, name)!r}: {remedy}")

    def _rules(self) -> list[tuple[str, bool, str]]:
        """What must hold between parameters: the one to name, whether it holds, the remedy."""
        asked = [part.split("=")[0] for part in self.intents.split()]
        ppo, penalty = self.algorithm == "ppo", self.shield_penalty
        prompts, samples = self.prompts_per_step, self.samples_per_prompt
        only_ppo = (self.lr_schedule, self.kl_target, self.stop_kl, self.processes)
        return [
            ("run", self.run != "reference",
             "that folder holds the published runs; choose another name"),
            ("ranker_dim", self.ranker_dim % self.ranker_heads == 0,
             f"must be a multiple of ranker_heads={self.ranker_heads}"),
            ("intents", self.reward == "faithful" or [*self.shares] == ["why"],
             f"reward {self.reward!r} is for the question why alone; use 'why=1'"),
            ("intents", bool(self.shares) and len(asked) == len(set(asked)),
             "name each intent once, with a number above 0"),
            ("warm_users", self.warm_users == 0 or self.warm_users >= self.chat_users,
             f"must be 0 or at least chat_users={self.chat_users}"),
            ("weight_form", self.weight_form + self.weight_faithfulness > 0,
             "weight_form or weight_faithfulness must be above 0"),
            ("shield_penalty", penalty > 0 or self.shield_mode != "penalty",
             "shield_mode='penalty' has nothing else; give it a weight, 100.0 say"),
            ("shield_replay_steps", penalty > 0 or self.shield_replay_steps == 0,
             "nothing to replay by; give shield_penalty a weight, 1000.0 say"),
            ("minibatches", prompts % self.minibatches == 0,
             f"must divide prompts_per_step={prompts}: all texts of a prompt go together"),
            ("baseline", samples > 1 or self.baseline == "value",
             "leave_one_out needs samples_per_prompt above 1"),
            ("processes", prompts % self.processes == 0, f"must divide prompts_per_step={prompts}"),
            ("algorithm", ppo or only_ppo == ("constant", 0.0, 0.0, 1),
             "lr_schedule, kl_target, stop_kl and processes work with 'ppo' only"),
            ("dtype", ppo or self.dtype != "bfloat16",
             f"{self.algorithm!r} trains in float32; use 'auto' or 'float32'"),
        ]  # fmt: skip

    @property
    def shares(self) -> dict[str, float]:
        """Share of each intent in the tuning's questions."""
        pairs = (part.split("=") for part in self.intents.split())
        counts = {intent: int(count) for intent, count in pairs}
        return {intent: count / sum(counts.values()) for intent, count in counts.items() if count}

    def replace(self, **changes: Any) -> "Params":
        """The same parameters with some ``changes``, validated again."""
        return Params(**{**self.as_dict(), **changes})

    def as_dict(self) -> dict[str, Any]:
        """Name and value of every parameter, in the order of the stages."""
        return self.model_dump()


_OWNERS: dict[str, type[StageParams]] = {
    "data": DataParams, "ranker": RankerParams, "explainer": ExplainerParams,
    "shield": ShieldParams, "shielded_ppo": PPOParams, "evaluation": EvaluationParams,
    "ablations": AblationsParams, "explore": ExploreParams,
}  # fmt: skip


def choices(name: str) -> tuple[str, ...]:
    """The values that parameter ``name`` may have; empty if it is no choice."""
    return get_args(Params.model_fields[name].annotation)


def owned_by(stage: str) -> list[str]:
    """Parameters that ``stage``'s notebook declares: the common ones, then its own, in order."""
    own = _OWNERS.get(stage, CommonParams).model_fields
    return list(CommonParams.model_fields | own)


def parameters_cell(stage: str) -> str:
    """Source of the parameters cell of a stage's notebook: lines ``name = default  # help``."""
    lines = []
    for name in owned_by(stage):
        field = Params.model_fields[name]
        default = f'"{field.default}"' if isinstance(field.default, str) else repr(field.default)
        options = f" ({' | '.join(choices(name))})" if choices(name) else ""
        lines.append(f"{name} = {default}  # {field.description}{options}")
    return "\n".join(lines)


def check_names(given: dict) -> None:
    """Raise ``ValueError`` for a name that is no parameter, with the nearest one that is."""
    for name in given.keys() - Params.model_fields.keys():
        near = get_close_matches(name, Params.model_fields, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(Params.model_fields)}"
        raise ValueError(f"unknown parameter {name!r}; {hint}")


_FILE = paths.LIBRARY / "profiles.yaml"
PROFILES: dict[str, dict[str, Any]] = yaml.safe_load(_FILE.read_text(encoding="utf-8"))


def resolve(profile: str, **overrides: Any) -> Params:
    """The parameters of ``profile`` with ``overrides`` on top."""
    if profile not in PROFILES:
        raise ValueError(f"unknown profile {profile!r}; choose one of {', '.join(PROFILES)}")
    return Params(**{**PROFILES[profile], **overrides})


def parse_value(name: str, text: str) -> bool | int | float | str:
    """``text`` from a command line as the type of parameter ``name``. Raises ``ValueError``."""
    check_names({name: text})
    kind = type(Params.model_fields[name].default)
    try:
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        wanted = "true or false" if kind is bool else f"of type {kind.__name__}"
        raise ValueError(f"command line: {name}={text!r} is not {wanted}") from None
