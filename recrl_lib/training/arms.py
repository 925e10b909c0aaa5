"""One arm of the study, from the base model to its final adapter: warm start, merge, reinforcement learning, settling.

An arm is stored as one adapter on the *base* model (``load_tuned``), whatever happened on the way, so
that its leak, its item vectors and its KL are all measured against the same model.

A run that was killed goes on: the warm start is kept as ``runs/<run>/checkpoints/<arm>/warm.safetensors`` and
Shielded PPO from its newest checkpoint beside it. With ``processes`` > 1 the PPO of an arm runs in as many
processes (``accelerate launch ... -m recrl_lib.training.arms --run RUN --arm ARM``), which leave their result as the
last checkpoint; this process picks it up there and only settles.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch.distributed as dist
from torch import Tensor
from torch import device as Device

from recrl_lib import paths, runs, study
from recrl_lib.explainer import item_texts, model
from recrl_lib.explainer.model import Explainer
from recrl_lib.params import Params
from recrl_lib.scoring.reward import Reward
from recrl_lib.shield import projection, subspaces
from recrl_lib.shield.projection import Shield
from recrl_lib.shield.replay import replay_for
from recrl_lib.shield.subspaces import Subspace
from recrl_lib.study import Study
from recrl_lib.training import ppo, tracking, warm_start
from recrl_lib.training.checkpoint import Store

TRAINED = ("unshielded", "shielded")


@dataclass
class Arm:
    """What training left: an adapter for ``load_tuned``, a row per iteration, a row per warm-start step."""

    name: str
    adapter: dict[str, Tensor]
    warm_adapter: dict[str, Tensor] | None  # the policy as the reinforcement learning met it
    curve: list[dict]
    warm_curve: list[dict]
    leak: float  # of the whole update, against the subspaces given, shielded or not
    settle_seconds: float  # in ``Shield.settle``, after the training
    frozen_intact: bool  # training itself never touched a frozen weight


def checkpoints(params: Params, name: str) -> Store:
    """Where arm ``name`` of the run keeps what it has reached, bound to parameters, code and inputs."""
    return Store(
        runs.run_folder(params.run) / "checkpoints" / name,
        runs.stage_key("shielded_ppo", params),
        params.checkpoint_keep,
    )


def forget(stage: runs.StageRun) -> None:
    """Delete the checkpoints of every arm: the stage has finished."""
    shutil.rmtree(stage.folder / "checkpoints", ignore_errors=True)


def train(
    name: str, stage: runs.StageRun, world: Study, protected: dict[str, Subspace], reward
) -> Arm:
    """Tune arm ``name``, ``unshielded`` or ``shielded``; arms share their seeds, so that they are comparable."""
    if name not in TRAINED:
        raise ValueError(f"arm {name!r}: only {', '.join(TRAINED)} are trained")
    params, store = stage.params, checkpoints(stage.params, name)
    seeds = {phase: stage.torch_seed(phase) % 2**32 for phase in ("lora", "warm", "ppo", "settle")}
    explainer = model.load_for(params, seeds["lora"], stage.device)
    records = world.training_records()

    shielded = name == "shielded"
    replay = (
        replay_for(explainer, world, params, set(stage.load_json("held_out_items")))
        if shielded
        else None
    )
    # Beside PPO's gradient a replay's is many times as large, and costs a tenth of the step; an arm that settles does without it there.
    only_later = params.shield_replay_steps and params.shield_mode != "penalty"

    def guard(phase: str) -> Shield | None:
        if replay:
            replay.generator.manual_seed(
                seeds[phase]
            )  # a run that goes on after the warm start replays the same texts
        beside = None if phase == "ppo" and only_later else replay
        return Shield(explainer, protected, params.shield_mode, beside) if shielded else None

    first, warm = None, {"curve": [], "intact": True}
    if params.warm_start:
        fresh, before = explainer.adapter_state(), item_texts.weights_sha256(explainer)
        found = store.load("warm")
        if found is None:
            curve = warm_start.fit(
                explainer,
                records,
                params.warm_steps,
                params.warm_batch,
                params.warm_lr,
                seeds["warm"],
                guard("warm"),
                f"warm start, {name}",
            )
            found = (
                explainer.adapter_state(),
                {"curve": curve, "intact": item_texts.weights_sha256(explainer) == before},
            )
            store.save("warm", *found)
        first, warm = found
        explainer.load_adapter(first)
        warm_start.merge(explainer, fresh)
    before, shield, desc = (
        item_texts.weights_sha256(explainer),
        guard("ppo"),
        f"{params.algorithm}, {name}",
    )
    if params.processes > 1 and not dist.is_initialized():
        _launch(name, stage)
    tracker = _tracker(name, stage)
    if params.algorithm == "ppo":
        curve = ppo.PPO(explainer, reward, records, params, seeds["ppo"], shield).train(
            params.ppo_steps, desc, store, tracker.log
        )
        if shield:
            shield.detach()
    else:
        curve = _by_trl(
            explainer, reward, records, params, seeds["ppo"], shield, store, desc, tracker.log
        )
    tracker.finish()
    start = perf_counter()
    if (
        shielded and params.shield_replay_steps and not dist.is_initialized()
    ):  # in one process; a run that goes on settles anew
        guard("settle").settle(params.shield_replay_steps)
    settle_seconds = perf_counter() - start
    intact = warm["intact"] and item_texts.weights_sha256(explainer) == before
    second = explainer.adapter_state()
    adapter, warm_adapter = second, None
    if first is not None:
        nothing = {key: tensor.new_zeros(tensor.shape) for key, tensor in second.items()}
        adapter, warm_adapter = warm_start.stack(first, second), warm_start.stack(first, nothing)
    del explainer, shield
    sealed = projection.leak(load_tuned(params, adapter, stage.device), protected)
    return Arm(name, adapter, warm_adapter, curve, warm["curve"], sealed, settle_seconds, intact)


def _tracker(name: str, stage: runs.StageRun) -> tracking.Tracker:
    """The arm's curve as it grows; of several processes, the first one of those that train has it."""
    params = stage.params
    silent = params.processes > 1 and (not dist.is_initialized() or dist.get_rank() > 0)
    return tracking.open(
        "none" if silent else params.tracker,
        stage.folder / "logs",
        name,
        params.run,
        params.as_dict(),
    )


def _by_trl(
    explainer: Explainer,
    reward,
    records: list[dict],
    params: Params,
    seed: int,
    shield: Shield | None,
    store: Store,
    desc: str,
    log: Callable[[dict, int], None],
) -> list[dict]:
    """RLOO or GRPO. Such an arm is stored when it is done, not on the way."""
    from recrl_lib.training import trl  # TRL takes seconds to import

    found = store.load(params.algorithm)
    if found is None:
        rows = trl.train(explainer, reward, records, params, seed, shield, desc, log)
        found = explainer.adapter_state(), {"rows": rows}
        store.save(params.algorithm, *found)
    explainer.load_adapter(found[0])
    return found[1]["rows"]


def load_tuned(
    params: Params, adapter: dict[str, Tensor] | None = None, device: Device | str = "cpu"
) -> Explainer:
    """The base model with adapters of an arm's final shape: rank 2r after a warm start, else r. B = 0 without ``adapter``."""
    parts = 2 if params.warm_start else 1
    explainer = model.load(params.llm, device).add_lora(
        params.lora_rank * parts, params.lora_alpha * parts, params.lora_layers, seed=0
    )
    if adapter is not None:
        explainer.load_adapter(adapter)
    return explainer


# --- several processes --------------------------------------------------------------------------


def _launch(name: str, stage: runs.StageRun) -> None:
    """Train one arm's PPO in ``processes`` processes. ``RuntimeError`` names the log if one of them fails."""
    # --multi_gpu is what makes accelerate start several processes, on a CPU (gloo) too: with --cpu it starts one.
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        str(stage.params.processes),
    ]
    command += [
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
    ]
    command += ["-m", "recrl_lib.training.arms", "--run", stage.params.run, "--arm", name]
    log = stage.folder / "logs" / f"ppo_{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as out:
        done = subprocess.run(
            command,
            stdout=out,
            stderr=out,
            cwd=paths.ROOT,
            env={"RECRL_PROGRESS": "off", **os.environ},
        )
    if done.returncode:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        failed = f"arm {name!r} in {stage.params.processes} processes: exit code {done.returncode}"
        raise RuntimeError(f"{failed}, see {runs.display(log)}: {''.join(last)}")


def main(arguments: list[str] | None = None) -> None:
    """One of the processes. The run's parameters, inputs and warm start lie in its folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True)
    parser.add_argument("--arm", required=True, choices=TRAINED)
    given = parser.parse_args(arguments)
    params = runs.read_params(given.run)
    if params is None:
        parser.error(f"run {given.run!r} does not exist")
    from accelerate import Accelerator

    stage = runs.start("shielded_ppo", params.as_dict())
    accelerator = Accelerator(cpu=stage.device.type == "cpu")  # joins the other processes
    if accelerator.process_index:
        os.environ["RECRL_PROGRESS"] = "off"
    if stage.device.type == "cuda":
        stage.device = accelerator.device
    world = study.load(stage)
    scorer = Reward.of(params, world.catalogue)
    train(given.arm, stage, world, subspaces.from_tensors(stage.load_tensors("subspaces")), scorer)
    accelerator.end_training()


if __name__ == "__main__":
    main()
