"""Mirror a run's curves to Weights & Biases or TensorBoard. The run folder's own CSV and JSON stay the truth.

::

    tracker = tracking.open(params.tracker, stage.folder / "logs", job_type="shielded", name=params.run, config=params.as_dict())
    tracker.log(row, step=row["step"])
    tracker.finish()

Both packages are optional (see environment.yml). W&B works offline, with all its files in the folder given, unless
``WANDB_API_KEY`` is set; it never asks for a login and prints nothing. With a key that does not work, or without a network, it warns
and works offline too: a training does not end for want of a mirror. ``wandb sync <folder>/wandb/offline-run-*``
uploads later. Project and entity are W&B's own ``WANDB_PROJECT`` (default ``shielded-recrl``) and ``WANDB_ENTITY``.
"""

import numbers
import os
import warnings
from pathlib import Path
from typing import Any

ONLINE_TIMEOUT = 30.0  # seconds that W&B may take to come up; its own default is 90, for each arm
KINDS = ("none", "wandb", "tensorboard")


class Tracker:
    """Does nothing: tracker ``none``, and what the others look like."""

    def log(self, row: dict[str, Any], step: int) -> None:
        """The numbers of one row of a curve; strings and the like are left out."""

    def finish(self) -> None:
        """Flush and close. Nothing can be logged afterwards."""


class WandB(Tracker):
    def __init__(self, folder: Path, group: str, job_type: str, name: str, config: dict[str, Any]):
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault(
            "WANDB_NOTEBOOK_NAME", job_type
        )  # else it looks for a notebook server
        import wandb

        def start(mode: str, **settings: Any):
            return wandb.init(
                project=os.environ.get("WANDB_PROJECT") or "shielded-recrl", dir=folder, mode=mode,
                group=group, job_type=job_type, name=name, config=config, reinit="create_new",
                settings=wandb.Settings(silent=True, console="off", disable_code=True, x_disable_stats=True, **settings),
            )  # fmt: skip

        folder.mkdir(parents=True, exist_ok=True)
        run = None
        if os.environ.get("WANDB_API_KEY"):
            try:
                run = start("online", init_timeout=ONLINE_TIMEOUT)
            except Exception as error:  # a key that is wrong, a server that is not there, ...
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
                warnings.warn(
                    f"tracker='wandb' goes on offline, upload later with wandb sync: {reason}",
                    stacklevel=3,
                )
        self._run = start("offline") if run is None else run

    def log(self, row: dict[str, Any], step: int) -> None:
        self._run.log(_numbers(row), step=step)

    def finish(self) -> None:
        self._run.finish()


class TensorBoard(Tracker):
    def __init__(self, folder: Path, group: str, job_type: str, name: str, config: dict[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard" / job_type))
        facts = {"run": name, "group": group, **config}
        self._writer.add_text(
            "parameters", "\n".join(f"    {key}: {value}" for key, value in facts.items())
        )

    def log(self, row: dict[str, Any], step: int) -> None:
        for name, value in _numbers(row).items():
            self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self._writer.close()


def open(kind: str, folder: Path, job_type: str, name: str, config: dict[str, Any]) -> Tracker:
    """A tracker of ``kind`` that writes below ``folder``.

    ``job_type`` is the policy (``shielded``), ``name`` the run. In a batch (``RECRL_BATCH`` and ``RECRL_ARM``, which
    ``make batch`` sets) the group is the batch, and the job type begins with the arm: ``kl0-shielded``; elsewhere the
    group is the run. ``ValueError`` for an unknown kind, or a package that is not installed.
    """
    if kind not in KINDS:
        raise ValueError(f"parameter tracker={kind!r}: choose one of {', '.join(map(repr, KINDS))}")
    if kind == "none":
        return Tracker()
    group = os.environ.get("RECRL_BATCH") or name
    if arm := os.environ.get("RECRL_ARM"):
        job_type = f"{arm}-{job_type}"
    try:
        return (WandB if kind == "wandb" else TensorBoard)(
            Path(folder), group, job_type, name, config
        )
    except ImportError as error:
        raise ValueError(
            f"parameter tracker={kind!r}: {error}; install it as environment.yml says ('optional'), or use 'none'"
        ) from None


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    def is_number(value: Any) -> bool:
        return isinstance(value, numbers.Real) or getattr(value, "ndim", None) == 0

    return {key: float(value) for key, value in row.items() if is_number(value)}
