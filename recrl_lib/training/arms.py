"""One arm of the study, from the base model to its final adapter.

A run that was killed goes on from ``runs/<run>/checkpoints/<arm>/``. With ``processes`` > 1,
``reinforce`` starts as many (``accelerate launch -m recrl_lib.training.arms``), which leave their
result as the last checkpoint; this process goes on from there.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from time import perf_counter

import torch
import torch.distributed as dist
from torch import Tensor

from recrl_lib import paths, runs, study
from recrl_lib.explainer import item_texts, model
from recrl_lib.explainer.model import Explainer
from recrl_lib.params import Params
from recrl_lib.scoring.reward import Reward
from recrl_lib.shield import projection, subspaces
from recrl_lib.shield.projection import Shield
from recrl_lib.shield.replay import replay_for
from recrl_lib.shield.subspaces import Subspace
from recrl_lib.training import diagnostics, ppo, trl, warm_start
from recrl_lib.training.checkpoint import Store

TRAINED = ("unshielded", "shielded")


@dataclass
class Arm:
    """What training left."""

    adapter: dict[str, Tensor]  # for ``load_tuned``
    warm_adapter: dict[str, Tensor] | None  # the policy before reinforcement learning
    curve: list[dict]  # a row an iteration
    warm_curve: list[dict]  # a row a warm-start step
    leak: float  # of the whole update, against the protected subspaces, shielded or not
    replay_seconds: float  # spent in replay steps after training
    peak_memory_gb: float  # of the process, so far
    frozen_intact: bool  # training itself touched no frozen weight


class Training:
    """The training of arm ``name``; arms share their seeds, so that they are comparable."""

    def __init__(
        self,
        name: str,
        stage: runs.StageRun,
        study: study.Study,
        protected: dict[str, Subspace],
        reward: Reward,
    ):
        if name not in TRAINED:
            raise ValueError(f"arm {name!r}: only {', '.join(TRAINED)} are trained")
        self.name, self.stage, self.params = name, stage, stage.params
        self.protected, self.reward, self.records = protected, reward, study.training_records()
        # "settle", the replay steps after training, has the name that it had in published runs.
        phases = ("lora", "warm", "ppo", "settle")
        self._seeds = {phase: stage.torch_seed(phase) % 2**32 for phase in phases}
        self.explainer = model.load_for(self.params, self._seeds["lora"], stage.device)
        folder, key = stage.folder / "checkpoints" / name, runs.stage_key(stage.name, self.params)
        self._store, self._replay = Store(folder, key, self.params.checkpoint_keep), None
        if name == "shielded":
            held = set(stage.load_json("held_out_items"))
            self._replay = replay_for(self.explainer, study, self.params, held)
        self._first: dict[str, Tensor] | None = None  # the warm start's adapter, merged by now
        self._warm = {"curve": [], "intact": True}
        self._frozen = item_texts.weights_sha256(self.explainer)

    def warm_start(self) -> None:
        """Supervised steps on composed explanations; then "adapter off" is the tuned model."""
        if not self.params.warm_start:
            return
        fresh, seed = self.explainer.adapter_state(), self._seeds["warm"]
        found = self._store.load("warm")
        if found is None:
            shield, desc = self.shield("warm"), f"warm start, {self.name}"
            rows = warm_start.fit(self.explainer, self.records, self.params, seed, shield, desc)
            found = self.explainer.adapter_state(), {"curve": rows, "intact": self._intact()}
            self._store.save("warm", *found)
        self._first, self._warm = found
        self.explainer.load_adapter(self._first)
        warm_start.merge(self.explainer, fresh)
        self._frozen = item_texts.weights_sha256(self.explainer)

    def shield(self, phase: str) -> Shield | None:
        """A new shield for ``phase``: warm, ppo or settle. None in the unshielded arm."""
        if self.name != "shielded":
            return None
        if replay := self._replay:  # a run that goes on after the warm start replays the same texts
            replay.generator.manual_seed(self._seeds[phase])
        # With replay steps after training, projecting PPO runs without replay, whose gradient
        # would be many times the reward's and cost a tenth of the step.
        later = self.params.shield_replay_steps and self.params.shield_mode != "penalty"
        replay = None if phase == "ppo" and later else replay
        return Shield(self.explainer, self.protected, self.params.shield_mode, replay)

    def reinforce(self) -> None:
        """Reinforcement learning on the reward, for ``ppo_steps`` iterations."""
        if self.params.processes > 1 and not dist.is_initialized():
            _launch(self.name, self.stage)
        tracker, algorithm = diagnostics.start_tracker(self.stage, self.name), self.params.algorithm
        shield, seed = self.shield("ppo"), self._seeds["ppo"]
        given = self.explainer, self.reward, self.records, self.params, seed, shield
        if algorithm == "ppo":
            steps, desc = self.params.ppo_steps, f"ppo, {self.name}"
            self.curve = ppo.PPO(*given).train(steps, desc, self._store, tracker.log)
            if shield:
                shield.detach()
        elif found := self._store.load(algorithm):
            self.explainer.load_adapter(found[0])
            self.curve = found[1]["rows"]
        else:
            self.curve = trl.train(*given, tracker.log)
            self._store.save(algorithm, self.explainer.adapter_state(), {"rows": self.curve})
        tracker.finish()

    def finish(self) -> Arm:
        """Replay steps after training, if the run has them; the arm as one adapter on the base."""
        start, steps = perf_counter(), self.params.shield_replay_steps
        if steps and not dist.is_initialized() and (shield := self.shield("settle")):
            shield.run_replay(steps)  # in one process; a run that goes on replays anew
        seconds, intact = perf_counter() - start, self._warm["intact"] and self._intact()
        adapter, warm_adapter = self.explainer.adapter_state(), None
        if self._first is not None:
            nothing = {key: torch.zeros_like(tensor) for key, tensor in adapter.items()}
            warm_adapter = warm_start.stack(self._first, nothing)
            adapter = warm_start.stack(self._first, adapter)
        device = self.stage.device
        memory = diagnostics.peak_memory_gb(device)
        del self.explainer, self._replay  # make room for the model that the leak is measured on
        leak = projection.leak(load_tuned(self.params, adapter, device), self.protected)
        curves = self.curve, self._warm["curve"]
        return Arm(adapter, warm_adapter, *curves, leak, seconds, memory, intact)

    def _intact(self) -> bool:
        return item_texts.weights_sha256(self.explainer) == self._frozen


def load_tuned(
    params: Params, adapter: dict[str, Tensor] | None = None, device: torch.device | str = "cpu"
) -> Explainer:
    """The base model with adapters of an arm's final shape: update 0 without ``adapter``."""
    parts = 2 if params.warm_start else 1  # see ``warm_start.stack``
    rank, alpha = params.lora_rank * parts, params.lora_alpha * parts
    explainer = model.load(params.llm, device).add_lora(rank, alpha, params.lora_layers, seed=0)
    if adapter is not None:
        explainer.load_adapter(adapter)
    return explainer


def _launch(name: str, stage: runs.StageRun) -> None:
    """Train an arm's PPO in ``processes`` processes. ``RuntimeError`` names a failure's log."""
    count = stage.params.processes
    # --multi_gpu is what makes accelerate start several processes, on a CPU (gloo) too.
    options = f"--multi_gpu --num_processes {count} --num_machines 1 --mixed_precision no"
    options += " --dynamo_backend no --main_process_port 0 -m recrl_lib.training.arms"
    command = [sys.executable, "-m", "accelerate.commands.launch", *options.split()]
    log = stage.folder / "logs" / f"ppo_{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    settings = {"cwd": paths.ROOT, "env": {"RECRL_PROGRESS": "off", **os.environ}}
    with open(log, "wb") as out:
        done = subprocess.run(
            [*command, stage.params.run, name], stdout=out, stderr=out, **settings
        )
    if done.returncode:
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        failed = f"arm {name!r} in {count} processes: exit code {done.returncode}"
        raise RuntimeError(f"{failed}, see {runs.display(log)}: {''.join(last)}")


def main(run: str, name: str) -> None:
    """One of the processes: its parameters, inputs and warm start lie in the run's folder."""
    from accelerate import Accelerator

    params = runs.read_params(run)
    if params is None:
        raise SystemExit(f"run {run!r} does not exist")
    stage = runs.start("shielded_ppo", params.as_dict())
    accelerator = Accelerator(cpu=stage.device.type == "cpu")  # joins the other processes
    if accelerator.process_index:
        os.environ["RECRL_PROGRESS"] = "off"
    if stage.device.type == "cuda":
        stage.device = accelerator.device
    loaded, protected = study.load(stage), subspaces.from_tensors(stage.load_tensors("subspaces"))
    training = Training(name, stage, loaded, protected, Reward.of(params, loaded.catalogue))
    training.warm_start()
    training.reinforce()
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
