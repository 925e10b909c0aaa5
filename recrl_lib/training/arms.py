"""One arm of the study, from the base model to its final adapter.

A run that was killed goes on from ``runs/<run>/checkpoints/<arm>/``. With ``processes`` > 1,
``reinforce`` starts as many, which leave their result as the last checkpoint; this process goes on
from there.
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
from recrl_lib.shield.projection import Shield, Spaces
from recrl_lib.shield.replay import replay_for
from recrl_lib.study import Study
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
        self, name: str, stage: runs.StageRun, study: Study, protected: Spaces, reward: Reward
    ):
        if name not in TRAINED:
            raise ValueError(f"arm {name!r}: only {', '.join(TRAINED)} are trained")
        self.name, self.stage, self.params = name, stage, stage.params
        self.protected, self.reward, self.records = protected, reward, study.training_records()
        self.explainer = model.load_for(self.params, self._seed("lora"), stage.device)
        folder, key = stage.folder / "checkpoints" / name, runs.stage_key(stage.name, self.params)
        self._store, self._replay = Store(folder, key, self.params.checkpoint_keep), None
        if name == "shielded":
            held = set(stage.load_json("held_out_items"))
            self._replay = replay_for(self.explainer, study, self.params, held)
        self._warm: dict = {"adapter": None, "curve": [], "intact": True}
        self._frozen = item_texts.weights_sha256(self.explainer)

    def _seed(self, phase: str) -> int:
        return self.stage.torch_seed(phase) % 2**32

    def warm_start(self) -> None:
        """Supervised steps on composed explanations; then "adapter off" is the tuned model."""
        if not self.params.warm_steps:
            return
        fresh, found = self.explainer.adapter_state(), self._store.load("warm")
        if found is None:
            seed, shield = self._seed("warm"), self.shield("warm")
            given = self.explainer, self.records, self.params, seed, shield
            found = {"curve": warm_start.fit(*given), "intact": self._intact()}
            found["adapter"] = self.explainer.adapter_state()
            self._store.save("warm", found)
        self._warm = found
        self.explainer.load_adapter(found["adapter"])
        warm_start.merge(self.explainer, fresh)
        self._frozen = item_texts.weights_sha256(self.explainer)

    def shield(self, phase: str) -> Shield | None:
        """A new shield for ``phase``, warm, ppo or settle; None in the unshielded arm."""
        if self.name != "shielded":
            return None
        replay, mode = self._replay, self.params.shield_mode
        if replay:  # a run that goes on after the warm start replays the same texts
            replay.generator.manual_seed(self._seed(phase))
        # The replay's gradient would be many times the reward's: where replay steps follow the
        # training, PPO that projects has none.
        if phase == "ppo" and self.params.shield_replay_steps and mode != "penalty":
            replay = None
        return Shield(self.explainer, self.protected, mode, replay)

    def reinforce(self) -> None:
        """Reinforcement learning on the reward, for ``ppo_steps`` iterations."""
        if self.params.processes > 1 and not dist.is_initialized():
            _launch(self.name, self.stage)
        tracker, algorithm = diagnostics.start_tracker(self.stage, self.name), self.params.algorithm
        shield, seed = self.shield("ppo"), self._seed("ppo")
        given = self.explainer, self.reward, self.records, self.params, seed, shield
        if algorithm == "ppo":
            steps, desc = self.params.ppo_steps, f"ppo, {self.name}"
            self.curve = ppo.PPO(*given).train(steps, desc, self._store, tracker.log)
            if shield:
                shield.detach()
        elif found := self._store.load(algorithm):
            self.explainer.load_adapter(found["adapter"])
            self.curve = found["curve"]
        else:
            self.curve = trl.train(*given, tracker.log)
            found = {"adapter": self.explainer.adapter_state(), "curve": self.curve}
            self._store.save(algorithm, found)
        tracker.finish()

    def finish(self) -> Arm:
        """Replay steps after training, if the run has them; the arm as one adapter on the base."""
        start, steps = perf_counter(), self.params.shield_replay_steps
        # "settle", the replay steps' name in published runs, decides their seed.
        if steps and (shield := self.shield("settle")):
            shield.run_replay(steps)  # a run that goes on replays anew
        seconds, intact = perf_counter() - start, self._warm["intact"] and self._intact()
        adapter, warm, device = self.explainer.adapter_state(), None, self.stage.device
        if first := self._warm["adapter"]:
            nothing = {key: torch.zeros_like(tensor) for key, tensor in adapter.items()}
            warm, adapter = warm_start.stack(first, nothing), warm_start.stack(first, adapter)
        memory = diagnostics.peak_memory_gb(device)
        del self.explainer, self._replay  # make room for the model that the leak is measured on
        leak = projection.leak(load_tuned(self.params, adapter, device), self.protected)
        return Arm(adapter, warm, self.curve, self._warm["curve"], leak, seconds, memory, intact)

    def _intact(self) -> bool:
        return item_texts.weights_sha256(self.explainer) == self._frozen


def load_tuned(
    params: Params, adapter: dict[str, Tensor] | None = None, device: torch.device | str = "cpu"
) -> Explainer:
    """The base model with adapters of an arm's final shape: update 0 without ``adapter``."""
    parts = 2 if params.warm_steps else 1  # see ``warm_start.stack``
    rank, alpha = params.lora_rank * parts, params.lora_alpha * parts
    explainer = model.load(params.llm, device).add_lora(rank, alpha, params.lora_layers, seed=0)
    if adapter is not None:
        explainer.load_adapter(adapter)
    return explainer


def _launch(name: str, stage: runs.StageRun) -> None:
    """Train an arm's PPO in ``processes`` processes. ``RuntimeError`` names a failure's log."""
    count, log = stage.params.processes, stage.folder / "logs" / f"ppo_{name}.log"
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    start += [f"--nproc-per-node={count}", "-m", "recrl_lib.training.arms", stage.params.run, name]
    environment = {"RECRL_PROGRESS": "off", **os.environ}
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as out:
        done = subprocess.run(start, cwd=paths.ROOT, env=environment, stdout=out, stderr=out)
    if done.returncode:
        failed = f"arm {name!r} in {count} processes: exit code {done.returncode}"
        raise RuntimeError(f"{failed}, see {runs.display(log)}")


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
    stage.device = accelerator.device
    loaded, protected = study.load(stage), subspaces.from_tensors(stage.load_tensors("subspaces"))
    training = Training(name, stage, loaded, protected, Reward.of(params, loaded.catalogue))
    training.warm_start()
    training.reinforce()
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
