"""Published runs: ``make sync-reference RUN=laptop`` copies a run's small files, and refreshes the README from them.

``runs/reference/<run>/`` holds parameters, manifest, metrics and curves; ``figures/reference/<run>/`` the
report's figures. ``make sync-frontier RUN=front`` publishes the full frontier of a run, however few of its other stages
have run: ``runs/reference/frontier/`` holds its rows, parameters and manifest (``notes.json`` there is about the files of other
origin beside them). The README's two tables stand between marker lines and are never typed by hand.
"""

import argparse
import shutil
from pathlib import Path

import pandas as pd

from recrl_lib import paths, runs
from recrl_lib.evaluation import frontier
from recrl_lib.params import PIPELINE
from recrl_lib.runs import sha256_file, write_atomic

COLUMNS = {  # README heading: metric, decimals
    "reward": ("reward", 3),
    "CTR lift (95 % interval)": ("ctr_lift", 3),
    "judged quality": ("quality", 3),
    "NDCG@10": ("ndcg@10", 4),
    "top-10 overlap": ("top10_overlap", 3),
    "top-1 same": ("top1_same", 3),
    "max abs. score change": ("max_abs_score_delta", 3),
}
SETTINGS = {  # the rows of the README's frontier: fields of ``frontier.Point``
    "no shield": {"mode": "none"},
    "random directions, 311 of 576": {"basis": "random", "rank": 311},
    "the gradient projected (the published method)": {"mode": "gradient"},
    "the update projected, textbook basis": {"energy": 0.99},
    "the update projected, contrastive basis": frontier.CONTRASTIVE,
    "that, with a replay penalty": frontier.REPLAYED,
    "that, with the replay, energy .999 in place of .99": {**frontier.REPLAYED, "energy": 0.999},
    "that, with the replay, which favours the boundary of the top ten": {
        **frontier.REPLAYED,
        "replay": "boundary",
    },
    "that, with the replay, settled afterwards": {**frontier.REPLAYED, "settle": 150},
    "a replay penalty alone, weight 1": {"mode": "penalty", "penalty": 1.0},
    "a replay penalty alone, weight 10": {"mode": "penalty", "penalty": 10.0},
    "a replay penalty alone, weight 100": {"mode": "penalty", "penalty": 100.0},
    "activated LoRA, never merged": {"mode": "alora"},
}
SHARES = {
    "top-10 places kept": "overlap",
    "of items no basis had seen": "overlap_held",
    "first places kept": "top1_same",
    "learning kept": "gain_loss",
}


def sync(run: str) -> Path:
    """Copy ``run``'s small files to the reference folders and refresh the README's table.

    Raises ``RuntimeError`` if a stage is missing or out of date, or ran on a dirty git tree, or if the tree is dirty now.
    """
    params = runs.read_params(run)
    if params is None:
        raise RuntimeError(f"runs/{run} does not exist: make all RUN={run}")
    stale = [stage.name for stage in PIPELINE if not runs.up_to_date(stage.name, params)]
    if stale:
        raise RuntimeError(
            f"runs/{run}: stages {', '.join(stale)} are missing, failed or out of date: make all RUN={run}, with the run's profile and seed"
        )
    manifest = runs.read_manifest(run)
    drawn = sorted((paths.FIGURES / run).glob("*.svg"))
    if not drawn:
        raise RuntimeError(
            f"figures/{run} holds no figure: make all RUN={run} FORCE=1, with the run's profile and seed"
        )
    _check_source(manifest, f"make all RUN={run} FORCE=1, with the run's profile and seed")
    if (
        runs.git_state()[1] is not False
    ):  # what is published must be what the commit's code reads and writes
        raise RuntimeError(
            f"the git tree has uncommitted changes, or is none (see git status): commit or remove them, then make sync-reference RUN={run}"
        )
    source, target = runs.run_folder(run), paths.REFERENCE / run
    shutil.rmtree(target, ignore_errors=True)
    written = [
        name
        for stage in manifest["stages"].values()
        for name in stage["outputs"]
        if name.startswith(("metrics/", "curves/"))
    ]
    for name in ("params.yaml", "manifest.json", *written):
        write_atomic(target / name, (source / name).read_bytes())
    figures = paths.FIGURES / "reference" / run
    shutil.rmtree(figures, ignore_errors=True)
    for path in drawn:
        write_atomic(figures / path.name, path.read_bytes())
    readme = paths.ROOT / "README.md"
    write_atomic(readme, with_table(readme.read_text(encoding="utf-8"), "reference", table(run)))
    return target


def sync_frontier(run: str) -> Path:
    """Copy the full frontier that ``run``'s notebook 04 ran, and refresh the README's table of it.

    Raises ``RuntimeError`` if the stage has not finished, had another set of points, a stage ran on a dirty git tree, or the rows are
    not those that the stage wrote. Nothing is written then.
    """
    params, folder, manifest = runs.read_params(run), runs.run_folder(run), runs.read_manifest(run)
    again = f'make all RUN={run} TO=shield SET="frontier_points=full frontier_seeds=3 frontier_users=64", with the run\'s profile and seed'
    stage = manifest["stages"].get("shield", {})
    if stage.get("status") != "finished" or params.frontier_points != "full":
        raise RuntimeError(f"runs/{run}: notebook 04 has not finished a full frontier: {again}")
    _check_source(manifest, f"{again} and FORCE=1")
    path = folder / "curves" / "frontier.csv"
    if not path.is_file() or sha256_file(path) != stage["outputs"]["curves/frontier.csv"]:
        raise RuntimeError(
            f"{runs.display(path)} is missing or has changed since notebook 04 wrote it: {again}"
        )
    target, readme = paths.REFERENCE / "frontier", paths.ROOT / "README.md"
    text = with_table(
        readme.read_text(encoding="utf-8"), "frontier", frontier_table(pd.read_csv(path), manifest)
    )
    for source in (path, folder / "params.yaml", folder / "manifest.json"):
        write_atomic(target / source.name, source.read_bytes())
    write_atomic(readme, text)
    return target


def _check_source(manifest: dict, again: str) -> None:
    """``RuntimeError`` if a stage of the run has no commit that is its code."""
    if any(
        stage["git_dirty"] or stage["git_commit"] is None for stage in manifest["stages"].values()
    ):
        raise RuntimeError(
            f"runs/{manifest['run']}: it ran on uncommitted changes, so its numbers have no source; commit, then {again}"
        )


def frontier_table(rows: pd.DataFrame, manifest: dict) -> str:
    """Main settings of a frontier's ``rows`` in Markdown, with their run's provenance below: means over seeds, and the least and the most.

    ``RuntimeError`` for a setting that has no row.
    """
    rows = frontier.with_gains(rows)
    lines = ["| " + " | ".join(("training", *SHARES)) + " |", "|---" * (len(SHARES) + 1) + "|"]
    for label, setting in SETTINGS.items():
        points = frontier.of_setting(rows, setting)
        if points.empty:
            raise RuntimeError(f"the frontier has no row for {label!r}: {setting}")
        ends = {
            name: (points[name].mean(), points[name].min(), points[name].max())
            for name in SHARES.values()
        }
        cells = [
            f"{mean:.1%}" if lo == hi else f"{mean:.1%} ({lo:.1%} to {hi:.1%})"
            for mean, lo, hi in ends.values()
        ]
        lines.append("| " + " | ".join((label, *cells)) + " |")
    seeds, steps = rows["seed"].nunique(), rows["steps"].max()
    return "\n".join(
        (
            *lines,
            "",
            f"{steps} steps each; means over {seeds} seeds (least to most). Run `{manifest['run']}`: seed {manifest['seed']}, {manifest['device']}, "
            f"commit `{manifest['git_commit'][:10]}`. Source: [`runs/reference/frontier/frontier.csv`](runs/reference/frontier/frontier.csv).",
        )
    )


def table(run: str) -> str:
    """The headline table of a reference run in Markdown, with its provenance below."""
    folder = Path("reference") / run
    metrics, manifest = (
        runs.read_metrics(folder.as_posix(), "evaluation"),
        runs.read_manifest(folder.as_posix()),
    )
    lines = ["| arm | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for arm in runs.ARMS:
        cells = []
        for name, decimals in COLUMNS.values():
            text = f"{metrics[f'{arm}/{name}']:.{decimals}f}"
            if name == "ctr_lift":
                text += f" ({metrics[f'{arm}/ctr_lift_lo']:.{decimals}f} to {metrics[f'{arm}/ctr_lift_hi']:.{decimals}f})"
            cells.append(text)
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    seconds = sum(stage["seconds"] for stage in manifest["stages"].values())
    lines.append("")
    lines.append(
        f"Run `{run}`: seed {manifest['seed']}, {metrics['eval_users']} held-out users, {manifest['device']}, {manifest['threads']} threads, "
        f"{seconds / 60:.0f} minutes, commit `{manifest['git_commit'][:10]}`. "
        f"Source: [`runs/reference/{run}/metrics/evaluation.json`](runs/reference/{run}/metrics/evaluation.json)."
    )
    return "\n".join(lines)


def markers(name: str) -> tuple[str, str]:
    """The lines of the README before and after the table ``name``."""
    return f"<!-- {name} table: begin -->", f"<!-- {name} table: end -->"


def with_table(readme: str, name: str, content: str) -> str:
    """``readme`` with ``content`` between the markers of ``name``. ``RuntimeError`` if they are missing."""
    begin, end = markers(name)
    if (
        readme.count(begin) != 1
        or readme.count(end) != 1
        or readme.index(begin) > readme.index(end)
    ):
        raise RuntimeError(
            f"README.md: needs the lines {begin} and {end}, once each and in this order"
        )
    return (
        readme[: readme.index(begin)]
        + f"{begin}\n{content}\n{end}"
        + readme[readme.index(end) + len(end) :]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True)
    parser.add_argument("--frontier", action="store_true", help="publish the run's frontier alone")
    args = parser.parse_args()
    try:
        print(
            f"copied to {runs.display((sync_frontier if args.frontier else sync)(args.run))}; the README's table is up to date"
        )
    except RuntimeError as error:
        raise SystemExit(f"FAILED {error}") from None
