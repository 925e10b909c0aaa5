"""Data parallel: two real processes (gloo) do the update of one."""

import multiprocessing
import os
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from recrl_lib.tests.training.small import PARAMS as SMALL
from recrl_lib.tests.training.small import TIMES, leak
from recrl_lib.tests.training.small import trainer as trainer_of

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["recrl_lib.tests.training.small"])
# Texts differ in length, so that the two halves hold unequal token counts.
PARAMS = SMALL.replace(
    learning_rate=1e-2, prompts_per_step=4, micro_batch=3, kl_target=0.01, stop_kl=1.0
)


def steps(folder: str) -> dict[str, torch.Tensor]:
    """Adapter, value head and generators after two shielded iterations; the rows; the leak."""
    os.environ["RECRL_HOME"], os.environ["RECRL_PROGRESS"] = folder, "off"
    trained = trainer_of(mode="update", params=PARAMS)
    rows = trained.train(2)
    state = {k: v for k, v in trained.state()[0].items() if not k.startswith("optimizer")}
    numbers = {f"row/{n}/{k}": v for n, row in enumerate(rows) for k, v in row.items()}
    numbers["leak"] = leak(trained)
    return state | {k: torch.tensor(v, dtype=torch.float64) for k, v in numbers.items()}


def one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    save_file(steps(folder), Path(folder) / f"{rank}.safetensors")
    dist.destroy_process_group()


def test_two_processes_do_the_update_of_one_and_hold_the_same_policy(tmp_path):
    folder = str(tmp_path)
    children = [PROCESSES.Process(target=one_of_two, args=(rank, folder)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        assert child.exitcode == 0
    both = [load_file(tmp_path / f"{rank}.safetensors") for rank in range(2)]
    one = steps(folder)
    assert 0 < one["row/0/eos_rate"] < 1 and one["row/0/gradient_norm"] > 0
    for name, expected in one.items():
        if name.rpartition("/")[2] not in TIMES | {"leak"}:
            got = both[0][name]
            torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-6, msg=name)
        if not name.startswith("row"):
            assert torch.equal(both[0][name], both[1][name]), name
    assert both[0]["leak"] <= 1e-6
    assert all(v.abs().max() > 0 for k, v in both[0].items() if "lora_B" in k)  # it could leak
