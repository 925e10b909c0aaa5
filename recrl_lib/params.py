"""Every parameter of the study, once: name, type, default, range, help, and the stage that owns it.

The defaults are the ``smoke`` profile; the other profiles list only what they change. A notebook's
``parameters`` cell declares exactly the parameters its stage owns, with the smoke values, plus the
common ones (``run``, ``seed``, ``device``); a test holds the two together. Later stages read
earlier stages' parameters from ``runs/<run>/params.yaml``.
"""

from dataclasses import asdict, dataclass, field, fields
from difflib import get_close_matches
from math import isfinite
from typing import Any


@dataclass(frozen=True)
class Stage:
    """One notebook: its number, its name in messages and files, and the stages whose output it reads."""

    number: int
    name: str
    needs: tuple[str, ...] = ()

    @property
    def notebook(self) -> str:
        return f"{self.number:02d}_{self.name}.ipynb"


STAGES = (
    Stage(0, "environment"),
    Stage(1, "data"),
    Stage(2, "ranker", ("data",)),
    Stage(3, "explainer", ("data", "ranker")),
    Stage(4, "shield", ("data", "ranker", "explainer")),
    Stage(5, "shielded_ppo", ("data", "ranker", "explainer", "shield")),
    Stage(6, "evaluation", ("data", "ranker", "explainer", "shield", "shielded_ppo")),
    Stage(7, "ablations", ("evaluation",)),
    Stage(8, "audit", ("data", "ranker", "evaluation")),
    Stage(
        9,
        "report",
        ("data", "ranker", "explainer", "shield", "shielded_ppo", "evaluation", "audit"),
    ),
    Stage(10, "explore", ("data", "ranker", "explainer", "shielded_ppo")),
)
DATASETS = (
    "ml-100k",
    "ml-25m",
    "ml-32m",
    "ml-latest-small",
    "amazon-books",
    "amazon-books-2018",
    "amazon-books-2014",
    "steam-200k",
    "csv",
)
PIPELINE = tuple(stage for stage in STAGES if stage.name != "explore")  # what `make all` runs
COMMON = "common"
TOP_K = 10  # items recommended to each user


def stage_named(name: str) -> Stage:
    for stage in STAGES:
        if stage.name == name:
            return stage
    raise ValueError(f"no stage is called {name!r}; stages: {', '.join(s.name for s in STAGES)}")


def _p(default, stage: str, help: str, low=None, high=None, choices: tuple = ()):
    return field(
        default=default,
        metadata={"stage": stage, "help": help, "low": low, "high": high, "choices": choices},
    )


@dataclass(frozen=True)
class Params:
    """All parameters, validated on construction. Raises ``ValueError`` naming the field and the remedy."""

    run: str = _p("smoke", COMMON, "name of the run folder under runs/")
    seed: int = _p(0, COMMON, "seed of everything random in the run", 0)
    device: str = _p("auto", COMMON, "where models run", choices=("auto", "cpu", "cuda"))

    dataset: str = _p("ml-100k", "data", "data set; csv: your own two tables", choices=DATASETS)
    ppo_users: float = _p(0.5, "data", "share of users whose prompts PPO trains on", 0.1, 0.9)
    validation_users: float = _p(
        0.1,
        "data",
        "share of users to choose settings on; those in neither group are held out",
        0.01,
        0.5,
    )
    heldout_items: float = _p(0.2, "data", "share of items that PPO never explains", 0.0, 0.9)
    data_dir: str = _p("", "data", "folder with the data set's files; empty: fetch them")
    split: str = _p(
        "leave-one-out",
        "data",
        "how events are held out for validation and test",
        choices=("leave-one-out", "global-time"),
    )
    min_core: int = _p(
        0,
        "data",
        "fewest events of a user and of an item, filtered until all have them; 1 = no filter; 0 = default",
        0,
    )
    max_interactions: int = _p(
        0, "data", "keep about this many of the latest events; 0 = the data set's default", 0
    )
    bad_row_limit: float = _p(
        0.01, "data", "largest share of bad rows in a file; more stop the run", 0.0, 1.0
    )
    item_case: str = _p(
        "plain",
        "data",
        "how the LLM reads item texts: plain, or upper: in capitals, which it tells from a chat",
        choices=("plain", "upper"),
    )
    user_column: str = _p("user", "data", "csv: column of the user in interactions")
    item_column: str = _p("item", "data", "csv: column of the item in interactions and in items")
    time_column: str = _p(
        "time", "data", "csv: column of the time in interactions; empty: file order counts"
    )
    rating_column: str = _p(
        "rating", "data", "csv: column of the rating in interactions, if there is one"
    )
    title_column: str = _p("title", "data", "csv: column of the title in items")
    year_column: str = _p("year", "data", "csv: column of the year in items, if there is one")
    genres_column: str = _p("genres", "data", "csv: column of the genres in items, if there is one")

    text: str = _p(
        "llm",
        "ranker",
        "item text in the ranker: the LLM's vectors, or none (plain SASRec)",
        choices=("llm", "none"),
    )
    llm: str = _p(
        "smollm2-135m-instruct", "ranker", "packaged model, Hugging Face id or local folder"
    )
    ranker_dim: int = _p(64, "ranker", "width of the ranker", 8)
    ranker_layers: int = _p(1, "ranker", "causal blocks", 1)
    ranker_heads: int = _p(2, "ranker", "attention heads", 1)
    ranker_max_len: int = _p(50, "ranker", "longest history read", 2)
    ranker_dropout: float = _p(0.2, "ranker", "dropout", 0.0, 0.9)
    ranker_lr: float = _p(1e-3, "ranker", "Adam learning rate", 0.0)
    ranker_batch: int = _p(16, "ranker", "users in a batch", 1)
    ranker_epochs: int = _p(2, "ranker", "most epochs", 1)
    ranker_patience: int = _p(
        4, "ranker", "evaluations without a better validation NDCG@10 before stopping", 1
    )
    ranker_item_dropout: float = _p(
        0.2, "ranker", "share of the history blanked in training", 0.0, 0.9
    )
    ranker_average: float = _p(
        0.99, "ranker", "decay a step of the average of weights that is kept; 0 = none", 0.0, 1.0
    )
    ranker_seeds: int = _p(
        1,
        "ranker",
        "rankers trained with text and without, to show their spread; the first is used",
        1,
    )
    cold_items: float = _p(
        0.1,
        "ranker",
        "share of items held out of a second training to measure cold start; 0 = skip",
        0.0,
        0.5,
    )

    lora_rank: int = _p(16, "explainer", "rank of the LoRA adapters (paper: 16)", 1)
    lora_alpha: int = _p(16, "explainer", "LoRA alpha; the update is scaled by alpha / rank", 1)
    lora_layers: int = _p(4, "explainer", "adapt the top n layers; 0 = all", 0)
    history_length: int = _p(5, "explainer", "most recent titles in the prompt", 1)
    temperature: float = _p(
        0.7,
        "explainer",
        "divides the logits in sampling, old, reference and new log-probabilities alike",
        0.05,
    )
    max_new_tokens: int = _p(24, "explainer", "longest explanation", 4)
    explain_users: int = _p(
        8, "explainer", "users whose base explanations are sampled in notebook 03", 1
    )
    reward: str = _p("grounded", "explainer", "reward variant", choices=("grounded", "paper"))
    weight_length: float = _p(
        0.5,
        "explainer",
        "reward: weight of length; 0 removes a part, the others are rescaled to sum to 1",
        0.0,
    )
    weight_relevance: float = _p(0.3, "explainer", "reward: weight of relevance", 0.0)
    weight_coherence: float = _p(0.2, "explainer", "reward: weight of coherence", 0.0)

    shield_mode: str = _p(
        "update",
        "shield",
        "how the shielded arm is protected",
        choices=("gradient", "update", "frozen_a", "penalty", "restart"),
    )
    shield_energy: float = _p(
        0.99,
        "shield",
        "share of the item texts' activation energy to protect, per layer input",
        0.0,
        1.0,
    )
    shield_rank: int = _p(
        0,
        "shield",
        "protect exactly this many directions per layer input; 0 = use shield_energy",
        0,
    )
    shield_basis: str = _p(
        "contrastive",
        "shield",
        "which directions are protected",
        choices=("activation", "sensitivity", "boundary", "contrastive", "readout", "random"),
    )
    shield_penalty: float = _p(
        0.0,
        "shield",
        "weight of a replay penalty on item vectors, with or without a projection",
        0.0,
    )
    shield_settle: int = _p(
        0,
        "shield",
        "steps of the replay alone after the training, at a rate that falls to zero; a PPO that projects then goes without it",
        0,
    )
    frontier_points: str = _p(
        "small", "shield", "settings compared in the frontier", choices=("none", "small", "full")
    )
    frontier_steps: int = _p(2, "shield", "supervised steps a frontier point", 1)
    frontier_seeds: int = _p(1, "shield", "seeds of the frontier", 1)
    frontier_users: int = _p(4, "shield", "validation users whose explanations measure a point", 2)

    warm_start: bool = _p(
        True,
        "shielded_ppo",
        "supervised steps on composed explanations before PPO, under the arm's own shield",
    )
    warm_steps: int = _p(4, "shielded_ppo", "optimizer steps of the warm start", 1)
    warm_batch: int = _p(4, "shielded_ppo", "explanations a warm-start step", 1)
    warm_lr: float = _p(3e-3, "shielded_ppo", "AdamW rate of the warm start", 0.0)
    ppo_steps: int = _p(2, "shielded_ppo", "rollout-update iterations", 1)
    prompts_per_step: int = _p(4, "shielded_ppo", "different prompts in a rollout", 1)
    samples_per_prompt: int = _p(4, "shielded_ppo", "explanations sampled per prompt", 1)
    ppo_epochs: int = _p(2, "shielded_ppo", "passes over each rollout", 1)
    minibatches: int = _p(2, "shielded_ppo", "optimizer steps per pass", 1)
    learning_rate: float = _p(2e-3, "shielded_ppo", "AdamW rate of the adapters", 0.0)
    value_lr: float = _p(1e-5, "shielded_ppo", "AdamW rate of the value head", 0.0)
    kl_coef: float = _p(0.02, "shielded_ppo", "per-token KL penalty in the reward", 0.0)
    clip_range: float = _p(0.2, "shielded_ppo", "PPO clip range of the ratio", 0.0, 1.0)
    value_clip: float = _p(0.2, "shielded_ppo", "clip range of the value", 0.0)
    gae_lambda: float = _p(1.0, "shielded_ppo", "GAE lambda (gamma is 1)", 0.0, 1.0)
    max_grad_norm: float = _p(1.0, "shielded_ppo", "gradient norm clip, before the shield", 0.0)
    missing_eos_penalty: float = _p(
        0.2,
        "shielded_ppo",
        "subtracted from the score of an explanation cut off before its end",
        0.0,
    )
    algorithm: str = _p(
        "ppo",
        "shielded_ppo",
        "what tunes the policy: ours, or TRL's RLOO or GRPO",
        choices=("ppo", "rloo", "grpo"),
    )
    micro_batch: int = _p(
        8,
        "shielded_ppo",
        "explanations in memory at once; changes memory and speed, not the update",
        1,
    )
    kl_target: float = _p(
        0.0,
        "shielded_ppo",
        "KL per explanation in nats that an adaptive kl_coef steers to; 0 = fixed kl_coef",
        0.0,
    )
    stop_kl: float = _p(
        0.0,
        "shielded_ppo",
        "skip a rollout's remaining passes above this approximate KL per token; 0 = never",
        0.0,
    )
    lr_schedule: str = _p(
        "constant",
        "shielded_ppo",
        "learning rates over the planned optimizer steps",
        choices=("constant", "linear"),
    )
    dtype: str = _p(
        "auto",
        "shielded_ppo",
        "precision of the forward passes; auto: bfloat16 on CUDA, else float32",
        choices=("auto", "float32", "bfloat16"),
    )
    checkpoint_every: int = _p(1, "shielded_ppo", "iterations between checkpoints", 1)
    checkpoint_keep: int = _p(2, "shielded_ppo", "checkpoints kept of each arm while it trains", 1)
    processes: int = _p(
        1,
        "shielded_ppo",
        "data-parallel processes (accelerate launch); must divide prompts_per_step",
        1,
    )
    tracker: str = _p(
        "none",
        "shielded_ppo",
        "mirror the curves to a tracker, files in logs/",
        choices=("none", "wandb", "tensorboard"),
    )

    eval_users: int = _p(24, "evaluation", "held-out users whose explanations are judged", 2)
    bootstrap: int = _p(2000, "evaluation", "bootstrap resamples of users", 100)
    sim_alpha: float = _p(
        0.5, "evaluation", "click model: weight of the ranker's standardised score"
    )
    sim_beta: float = _p(2.0, "evaluation", "click model: weight of the judge's quality")
    sim_bias: float = _p(-2.0, "evaluation", "click model: intercept")
    sim_position: float = _p(0.5, "evaluation", "click model: weight of the position's discount")
    sim_user_std: float = _p(0.5, "evaluation", "click model: spread of the users' own bias", 0.0)
    control_users: int = _p(
        6, "evaluation", "users for whom the control texts are scored, the first of eval_users", 2
    )
    warm_users: int = _p(
        6,
        "evaluation",
        "users for whom the warm-started policies speak, so that PPO's own gain shows; 0 = none",
        0,
    )

    batch: str = _p(
        "smoke", "ablations", "name of the grid whose finished runs are compared (make batch)"
    )

    interactive: bool = _p(False, "explore", "show the chat widget (needs a live JupyterLab)")

    def __post_init__(self):
        for f in fields(self):
            value, meta = getattr(self, f.name), f.metadata
            object.__setattr__(self, f.name, _typed(f.name, value, f.type))
            value = getattr(self, f.name)
            if meta["choices"] and value not in meta["choices"]:
                raise ValueError(
                    f"parameter {f.name}={value!r}: choose one of {', '.join(map(repr, meta['choices']))}"
                )
            if meta["low"] is not None and value < meta["low"]:
                raise ValueError(f"parameter {f.name}={value!r}: must be at least {meta['low']}")
            if meta["high"] is not None and value > meta["high"]:
                raise ValueError(f"parameter {f.name}={value!r}: must be at most {meta['high']}")
        if (
            not self.run
            or not all(c.isalnum() or c in "-_." for c in self.run)
            or self.run[0] in ".-"
        ):
            raise ValueError(
                f"parameter run={self.run!r}: use letters, digits, '-', '_' and '.', starting with a letter or digit"
            )
        if self.shield_mode == "penalty" and not self.shield_penalty:
            raise ValueError(
                "parameter shield_penalty=0.0: shield_mode='penalty' has nothing else; give it a weight, 100 say"
            )
        if self.shield_settle and not self.shield_penalty:
            raise ValueError(
                f"parameter shield_settle={self.shield_settle}: no replay to settle by; give shield_penalty a weight"
            )
        if not all(c.isalnum() or c in "-_" for c in self.batch):
            raise ValueError(
                f"parameter batch={self.batch!r}: use the name of a grid: letters, digits, '-' and '_'"
            )
        if self.run == "reference":
            raise ValueError(
                "parameter run='reference': that folder holds the published runs; choose another name"
            )
        if self.ranker_dim % self.ranker_heads:
            raise ValueError(
                f"parameter ranker_dim={self.ranker_dim}: must be a multiple of ranker_heads={self.ranker_heads}"
            )
        if not self.weight_length + self.weight_relevance + self.weight_coherence:
            raise ValueError(
                "parameters weight_length, weight_relevance, weight_coherence: at least one must be above 0"
            )
        samples = self.prompts_per_step * self.samples_per_prompt
        if samples % self.minibatches:
            raise ValueError(
                f"parameter minibatches={self.minibatches}: must divide prompts_per_step x samples_per_prompt = {samples}"
            )
        if self.prompts_per_step % self.processes:
            raise ValueError(
                f"parameter processes={self.processes}: must divide prompts_per_step={self.prompts_per_step}"
            )
        ours_alone = {
            "lr_schedule": "constant",
            "kl_target": 0.0,
            "stop_kl": 0.0,
        }  # what TRL's trainers are not told
        if changed := [
            name
            for name, value in ours_alone.items()
            if self.algorithm != "ppo" and getattr(self, name) != value
        ]:
            raise ValueError(
                f"parameter {changed[0]}={getattr(self, changed[0])!r}: works with algorithm='ppo' only, not {self.algorithm!r}"
            )
        if self.dtype == "bfloat16" and self.algorithm != "ppo":
            raise ValueError(
                f"parameter dtype='bfloat16': {self.algorithm!r} trains in float32; use 'auto' or 'float32'"
            )
        if self.processes > 1 and self.algorithm != "ppo":
            raise ValueError(
                f"parameter processes={self.processes}: only algorithm='ppo' trains data-parallel, not {self.algorithm!r}"
            )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _typed(name: str, value, kind: type):
    """``value`` as ``kind``, accepting an int for a float and nothing else; a bool is never a number."""
    if kind is float and type(value) is int:
        return float(value)
    if kind is float and isinstance(value, float) and not isfinite(value):
        raise ValueError(f"parameter {name}={value!r}: must be a finite number")
    if type(value) is not kind:
        raise ValueError(
            f"parameter {name}={value!r}: must be {kind.__name__}, not {type(value).__name__}"
        )
    return value


PROFILES: dict[str, dict[str, Any]] = {
    "smoke": {},
    "laptop": dict(
        # NDCG@10 of 943 users wanders by more than an epoch brings: a patience of 4 stopped two of ten trainings before their best
        # validation (seed 3, with text and without).
        ranker_layers=2,
        ranker_max_len=100,
        ranker_dropout=0.3,
        ranker_epochs=14,
        ranker_patience=8,
        lora_layers=10,
        max_new_tokens=40,
        explain_users=12,
        # A weight of 3000 kept no more of the ranking and had learned less by PPO's last step (runs/reference/frontier: settle.csv, notes.json).
        # That PPO leaves the replay to the settling, on users whom no laptop run judges: runs/reference/ppo_search.csv.
        shield_penalty=1000.0,
        shield_settle=150,
        frontier_points="none",
        frontier_steps=16,
        frontier_users=24,  # small: 3 minutes more
        warm_steps=30,
        ppo_steps=6,
        prompts_per_step=8,
        samples_per_prompt=4,
        micro_batch=16,
        eval_users=128,
        bootstrap=10_000,
        batch="ablations",
        control_users=64,
        warm_users=128,
    ),
    "pod": dict(
        ranker_layers=2,
        ranker_max_len=100,
        ranker_dropout=0.3,
        ranker_epochs=40,
        ranker_patience=6,
        ranker_seeds=5,
        lora_layers=0,
        max_new_tokens=64,
        explain_users=32,
        shield_penalty=1000.0,
        shield_settle=150,  # the laptop's, not tried at this scale
        frontier_points="full",
        frontier_steps=60,
        frontier_seeds=3,
        frontier_users=64,
        warm_steps=60,
        warm_batch=8,
        ppo_steps=150,
        prompts_per_step=32,
        samples_per_prompt=8,
        minibatches=4,
        learning_rate=3e-4,
        micro_batch=32,
        checkpoint_every=10,
        eval_users=377,
        bootstrap=10_000,
        batch="ablations",
        control_users=64,
        warm_users=377,
    ),
    "paper": dict(
        llm="TinyLlama/TinyLlama-1.1B-Chat-v1.0",
        ranker_dim=128,
        ranker_layers=2,
        ranker_dropout=0.3,
        ranker_batch=32,
        ranker_epochs=100,
        ranker_patience=10,
        lora_layers=0,
        max_new_tokens=40,
        explain_users=32,
        warm_start=False,
        ppo_steps=625,
        prompts_per_step=32,
        samples_per_prompt=8,
        ppo_epochs=4,
        minibatches=4,
        learning_rate=3e-5,
        kl_coef=0.05,
        micro_batch=16,
        checkpoint_every=25,
        eval_users=377,
        bootstrap=10_000,
        batch="ablations",
        control_users=64,
        warm_users=377,
        reward="paper",
    ),
}


def names() -> list[str]:
    return [f.name for f in fields(Params)]


def owned_by(stage: str) -> list[str]:
    """Parameters that ``stage``'s notebook declares: the common ones, then its own, in order."""
    return [f.name for f in fields(Params) if f.metadata["stage"] in (COMMON, stage)]


def check_names(given: dict, where: str) -> None:
    """Raise ``ValueError`` for a name that is no parameter, with the nearest one that is."""
    for name in given:
        if name not in names():
            near = get_close_matches(name, names(), n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; parameters: {', '.join(names())}"
            raise ValueError(f"{where}: unknown parameter {name!r}{hint}")


def resolve(profile: str, **overrides) -> Params:
    """The parameters of ``profile`` with ``overrides`` on top."""
    if profile not in PROFILES:
        raise ValueError(f"unknown profile {profile!r}; choose one of {', '.join(PROFILES)}")
    check_names(overrides, f"profile {profile}")
    return Params(**{**PROFILES[profile], **overrides})


def parse_value(name: str, text: str):
    """``text`` from a command line as the type of parameter ``name``. Raises ``ValueError``."""
    check_names({name: text}, "command line")
    kind = next(f.type for f in fields(Params) if f.name == name)
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return kind(text)
    except (KeyError, ValueError):
        raise ValueError(
            f"command line: {name}={text!r} is not {'true or false' if kind is bool else 'of type ' + kind.__name__}"
        ) from None
