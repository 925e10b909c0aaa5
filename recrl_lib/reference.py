"""Published runs: ``make sync-reference RUN=laptop`` copies a run's small files, and refreshes the README from them.

``runs/reference/<run>/`` holds parameters, manifest, metrics and curves; ``figures/reference/<run>/`` the
report's figures. The README's table stands between two marker lines and is never typed by hand.
"""

import argparse
import shutil
from pathlib import Path

from recrl_lib import config, paths, runs
from recrl_lib.files import write_atomic

BEGIN, END = "<!-- reference table: begin -->", "<!-- reference table: end -->"
COLUMNS = {  # README heading: metric, decimals
    "reward": ("reward", 3), "CTR lift (95 % interval)": ("ctr_lift", 3), "judged quality": ("quality", 3),
    "NDCG@10": ("ndcg@10", 4), "top-10 overlap": ("top10_overlap", 3), "top-1 same": ("top1_same", 3),
    "max abs. score change": ("max_abs_score_delta", 3),
}


def sync(run: str) -> Path:
    """Copy ``run``'s small files to the reference folders and refresh the README's table.

    Raises ``RuntimeError`` if a stage is missing or out of date, or ran on a dirty git tree, or if the tree is dirty now.
    """
    params = runs.read_params(run)
    if params is None:
        raise RuntimeError(f"runs/{run} does not exist: make all RUN={run}")
    stale = [stage.name for stage in config.PIPELINE if not runs.up_to_date(stage.name, params)]
    if stale:
        raise RuntimeError(f"runs/{run}: stages {', '.join(stale)} are missing, failed or out of date: make all RUN={run}, with the run's profile and seed")
    manifest = runs.read_manifest(run)
    drawn = sorted((paths.FIGURES / run).glob("*.svg"))
    if not drawn:
        raise RuntimeError(f"figures/{run} holds no figure: make all RUN={run} FORCE=1, with the run's profile and seed")
    if any(stage["git_dirty"] or stage["git_commit"] is None for stage in manifest["stages"].values()):
        raise RuntimeError(f"runs/{run}: it ran on uncommitted changes, so its numbers have no source; commit, then make all RUN={run} FORCE=1, with the run's profile and seed")
    if runs.git_state()[1] is not False:  # what is published must be what the commit's code reads and writes
        raise RuntimeError(f"the git tree has uncommitted changes, or is none (see git status): commit or remove them, then make sync-reference RUN={run}")
    source, target = runs.run_folder(run), paths.REFERENCE / run
    shutil.rmtree(target, ignore_errors=True)
    written = [name for stage in manifest["stages"].values() for name in stage["outputs"] if name.startswith(("metrics/", "curves/"))]
    for name in ("params.yaml", "manifest.json", *written):
        write_atomic(target / name, (source / name).read_bytes())
    figures = paths.FIGURES / "reference" / run
    shutil.rmtree(figures, ignore_errors=True)
    for path in drawn:
        write_atomic(figures / path.name, path.read_bytes())
    readme = paths.ROOT / "README.md"
    write_atomic(readme, with_table(readme.read_text(encoding="utf-8"), table(run)))
    return target


def table(run: str) -> str:
    """The headline table of a reference run in Markdown, with its provenance below."""
    folder = Path("reference") / run
    metrics, manifest = runs.read_metrics(folder.as_posix(), "evaluation"), runs.read_manifest(folder.as_posix())
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


def with_table(readme: str, content: str) -> str:
    """``readme`` with ``content`` between the markers. ``RuntimeError`` if they are missing."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise RuntimeError(f"README.md: needs the lines {BEGIN} and {END}, once each and in this order")
    return readme[: readme.index(BEGIN)] + f"{BEGIN}\n{content}\n{END}" + readme[readme.index(END) + len(END):]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True)
    try:
        print(f"copied to {runs.display(sync(parser.parse_args().run))}; the README's table is up to date")
    except RuntimeError as error:
        raise SystemExit(f"FAILED {error}") from None
