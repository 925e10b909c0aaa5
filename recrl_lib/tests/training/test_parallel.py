"""Data parallel: two real processes (gloo) do the update of one."""

import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from recrl_lib.explainer.item_texts import ItemTexts
from recrl_lib.params import resolve
from recrl_lib.shield import projection, subspaces
from recrl_lib.tests.tiny import tiny_explainer
from recrl_lib.tests.training.test_checkpoint import RECORDS, red
from recrl_lib.training import diagnostics, ppo

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["recrl_lib.training.ppo", "recrl_lib.tests.tiny"])
# A small temperature-1 policy whose answers differ in length, so that the two halves hold unequal token counts.
PARAMS = resolve(
    "smoke",
    lora_layers=1,
    max_new_tokens=8,
    temperature=1.0,
    learning_rate=1e-2,
    prompts_per_step=4,
    micro_batch=3,
    kl_target=0.01,
    stop_kl=1.0,
)


def steps(folder: str, n: int = 2) -> tuple[dict, list[dict]]:
    """(adapter and value head, rows) after ``n`` shielded iterations; the leak goes into the last row."""
    os.environ["RECRL_HOME"], os.environ["RECRL_PROGRESS"] = folder, "off"
    explainer = tiny_explainer(lora_layers=1)
    protected = subspaces.subspaces(
        subspaces.item_grams(
            explainer, ItemTexts(explainer, ["good film", "the red film and a blue film"])
        )[0],
        0.9,
    )
    trainer = ppo.PPO(explainer, red, RECORDS, PARAMS, 0, projection.Shield(explainer, protected))
    rows = trainer.train(n)
    rows[-1]["leak"] = projection.leak(explainer, protected)
    return {
        k: v
        for k, v in trainer.state()[0].items()
        if k.startswith(("adapter", "value", "generator"))
    }, rows


def one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    state, rows = steps(folder)
    numbers = {
        f"row/{n}/{k}": torch.tensor(v, dtype=torch.float64)
        for n, row in enumerate(rows)
        for k, v in row.items()
    }
    save_file(state | numbers, Path(folder) / f"{rank}.safetensors")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> list[dict]:
    folder = str(tmp_path_factory.mktemp("two"))
    children = [PROCESSES.Process(target=one_of_two, args=(rank, folder)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        assert child.exitcode == 0
    return [load_file(Path(folder) / f"{rank}.safetensors") for rank in range(2)]


def test_two_processes_do_the_update_of_one(both, tmp_path):
    state, rows = steps(str(tmp_path))
    assert 0 < rows[0]["eos_rate"] < 1 and rows[0]["gradient_norm"] > 0
    for name, tensor in state.items():
        torch.testing.assert_close(both[0][name], tensor, atol=1e-5, rtol=0, msg=name)
    for n, row in enumerate(rows):
        for name in row.keys() - set(diagnostics.TIMES) - {"leak"}:
            assert float(both[0][f"row/{n}/{name}"]) == pytest.approx(row[name], abs=2e-5), name


def test_both_processes_hold_the_same_policy_and_the_shield_holds(both):
    for name in both[0]:
        if name.startswith(("adapter", "value", "generator")):
            assert torch.equal(both[0][name], both[1][name]), name
    assert float(both[0]["row/1/leak"]) <= 1e-6
    moved = [float(v.abs().max()) for k, v in both[0].items() if "lora_B" in k]
    assert np.all(np.array(moved) > 0)  # there is an update that could leak


def test_processes_must_divide_the_prompts():
    with pytest.raises(ValueError, match="processes=3.*prompts_per_step=4"):
        resolve("smoke", processes=3)
    with pytest.raises(ValueError, match="only algorithm='ppo'"):
        resolve("smoke", processes=2, algorithm="grpo")
