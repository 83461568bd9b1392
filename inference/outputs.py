"""The outputs of `infer.py`: the submission, and whatever else was asked for."""

import contextlib
import functools
import json
import os
from pathlib import Path

import numpy as np
import torch

from inference.ensemble import checkpoint_paths
from inference.pseudo import write_pseudo
from inference.submission import write_submission
from openfwi.gathers import GatherDataset
from options.outputs import check_outside, check_replaces
from report.figures import calibration_figure, prediction_figure, steps_figure
from report.predictions import best_median_worst, print_misfits, print_warnings, write_misfits
from report.scores import by_family, error_table, score_table, spearman
from system.files import sole_use, write_atomic
from utils import FAMILIES
from waves.misfit import MISFITS, simulated

NEXT_TO_OUT = {  # what may be written next to --out: the ending, and the kind of file
    "misfit.csv": "table of misfits",
    "trace.jsonl": "file of traces",
    "worst.png": "picture",
}


def path_next_to_out(cfg, ending):
    """The path `<out without .csv>.<ending>`."""
    return Path(cfg.out).with_suffix(f".{ending}")


# ---------------------------------------------------------------- checks of the paths


def output_folders(cfg):
    """The folders into which files are written."""
    files = [Path(file).parent for file in (cfg.out, cfg.fit) if file]
    return [*files, *(Path(folder) for folder in (cfg.save_maps, cfg.figures, cfg.pseudo) if folder)]


def _output_files(cfg, oids):
    """(option, path, kind) of every file that may be written, except new files in an empty folder."""
    yield "out", Path(cfg.out), "submission"
    for ending, kind in NEXT_TO_OUT.items():
        yield "out", path_next_to_out(cfg, ending), kind
    if cfg.fit:
        yield "fit", Path(cfg.fit), "file of --fit"
    for oid in oids if cfg.save_maps else ():
        yield "save_maps", Path(cfg.save_maps, f"{oid}.npy"), "velocity map"
    for name in (*FAMILIES, "unknown", *MISFITS) if cfg.figures else ():
        yield "figures", Path(cfg.figures, f"{name}.png"), "picture"


def _identity(path):
    """Device and inode of a file: equal for all names of one file, hard and symbolic links included."""
    status = os.stat(path)
    return status.st_dev, status.st_ino


def check_outputs(cfg, gathers, truths):
    """Raise ValueError if an output would overwrite an input or a file of another kind, or be an input."""
    for name in ("save_maps", "pseudo"):
        if place := getattr(cfg, name):
            check_outside(name, place, [root for root in (cfg.input, cfg.truth) if root])
    checkpoints = checkpoint_paths(cfg.ckpt)
    inputs = [*checkpoints, *(path.with_suffix(".json") for path in checkpoints), Path(cfg.use or os.devnull)]
    inputs += [*(gather.path for gather in gathers), *(path for path, *_ in truths or ())]
    inputs, work = list(dict.fromkeys(inputs)), Path(f"{cfg.out}.work").resolve()
    for folder in dict.fromkeys(path.parent for path in inputs):
        if work in (folder.resolve(), *folder.resolve().parents):
            raise ValueError(f"{folder}: inputs are in {work}, where results are kept; give another --out")
    read, written = {_identity(path) for path in inputs if path.exists()}, {}
    resolved = functools.cache(Path.resolve)  # a folder may hold very many files
    for option, path, kind in _output_files(cfg, [gather.oid for gather in gathers]):
        if path.exists() and _identity(path) in read:
            raise ValueError(f"--{option}: {path} is an input and would be overwritten; give another path")
        check_replaces(path, kind)
        other = written.setdefault(resolved(path.parent) / path.name, option)
        if other != option:
            raise ValueError(f"--{option} and --{other} both write {path}; give another path")


# ---------------------------------------------------------------- files and tables


@contextlib.contextmanager
def folders_held(cfg):
    """Keep the folders of maps and figures for this command; ValueError tells who else is writing there."""
    with contextlib.ExitStack() as held:
        for folder in {Path(name).resolve() for name in (cfg.save_maps, cfg.figures) if name}:
            held.enter_context(sole_use(folder))
            held.callback((folder / ".lock").unlink, missing_ok=True)
        yield


def write_outputs(run, predictions, results):
    """Write the submission and all other outputs but `write_pairs`; return the score, {} without --truth."""
    with folders_held(run.cfg):
        return _write_outputs(run, predictions, results)


def _write_outputs(run, predictions, results):
    cfg, oids = run.cfg, [gather.oid for gather in run.gathers]
    errors = results["errors"][:, -1] if run.truths else None
    recognised = run.ensemble.families(predictions)
    families = [family for *_, family in run.truths] if run.truths else recognised
    write_submission(run.cfg.out, oids, results["vel"][:, 0])
    if cfg.save_maps:
        for oid, vel in zip(oids, results["vel"][:, 0], strict=True):
            with write_atomic(Path(cfg.save_maps, f"{oid}.npy")) as file:
                np.save(file, vel)
            run.stop.check()
    if cfg.refine != "none":
        write_traces(path_next_to_out(cfg, "trace.jsonl"), oids, results)
    if cfg.misfit or cfg.figures or cfg.pseudo:
        write_misfits(path_next_to_out(cfg, "misfit.csv"), oids, results, families, errors)
        print_warnings(oids, results)
        print_misfits(results, errors)
    if cfg.figures:
        draw_figures(run, results, families, errors)
    if cfg.misfit:
        worst = np.argsort(-results["log_misfit"], kind="stable")[: cfg.misfit].tolist()
        for i in worst:
            print(f"do not trust {oids[i]}: log misfit {results['log_misfit'][i]:.3f}")
        draw(path_next_to_out(cfg, "worst.png"), worst, run, results)
    print(f"{len(oids)} maps -> {cfg.out}")
    return print_scores(run, predictions, results, families) if run.truths else {}


def write_pairs(run, predictions, results):
    """Write the maps that explain their gathers as training pairs; all processes take part."""
    cfg, recognised = run.cfg, run.ensemble.families(predictions)
    good = np.flatnonzero(results["log_misfit"] <= cfg.pseudo_misfit)
    names = [recognised[i] or cfg.pseudo_family for i in good]
    write_pseudo(cfg.pseudo, results["vel"][good], names, cfg.batch_size, run.process, run.stop.check)
    if run.process.is_main:
        print(
            f"{len(good)} of {len(recognised)} maps, log misfit at most {cfg.pseudo_misfit:g} -> {cfg.pseudo}"
        )


def write_traces(path, oids, results):
    """Write the refining method's report on each gather, a line of JSON; say which it did not explain."""
    notes = {note.pop("number"): note for note in results.notes()}  # the last note of each gather
    with write_atomic(path, "w") as file:
        file.writelines(json.dumps({"oid": oid, **notes[i]}) + "\n" for i, oid in enumerate(oids))
    explained = [note["explained"] for note in notes.values() if "explained" in note]
    if explained:
        unexplained = [oid for i, oid in enumerate(oids) if not notes[i].get("explained", True)]
        first = f", the first {unexplained[0]}" if unexplained else ""
        print(f"{len(unexplained)} of {len(explained)} gathers not explained{first}; see {path}")


def print_scores(run, predictions, results, families):
    """Print errors of each network's views, after each stage, and by family; return the last table."""
    if len(run.ensemble.views) > 1 or len(predictions) > 1:
        for member, p in zip(run.ensemble.members, predictions, strict=True):
            views = {view.name: p["errors"][:, k] for k, view in enumerate(run.ensemble.views)}
            print(f"{member.path}:\n{error_table(views, families)}")
    if len(run.stages) > 1:
        stages = {name: results["errors"][:, k] for k, name in enumerate(run.stages)}
        print(error_table(stages, families))
    score = by_family(results["errors"][:, -1], families)
    print(score_table(score))
    return score


# ---------------------------------------------------------------- figures


def draw(path, numbers, run, results):
    """Draw the `prediction_figure` of the gathers `numbers`."""
    rows = []
    for i in numbers:
        vel = np.array(results["vel"][i])
        title = f"{run.gathers[i].oid}\nmisfit {results['misfit'][i]:.2%}"
        seis = GatherDataset(run.gathers)[i][1].numpy()
        other = simulated(torch.from_numpy(vel)[None].to(run.device))[0].cpu().numpy()
        rows.append((title, seis, true_map(run, i), vel[0], other))
    prediction_figure(path, rows)


def true_map(run, i):
    """The true map (70, 70) of gather i, or None without --truth."""
    return run.truth([i])[0, 0].numpy() if run.truths else None


def draw_figures(run, results, families, errors):
    """Draw the best, median and worst prediction of each family, by error if known, else by log misfit.

    If a prediction was refined in steps, these are drawn too. With errors, each kind of misfit is plotted
    against them.
    """
    folder, names = Path(run.cfg.figures), [family or "unknown" for family in families]
    for family, chosen in best_median_worst(names, results["log_misfit"] if errors is None else errors):
        run.stop.check()
        draw(folder / f"{family}.png", chosen, run, results)
        for i in chosen:
            if steps := results.steps_of(i):
                oid = run.gathers[i].oid
                steps_figure(folder / "steps" / f"{oid}.png", f"{family} {oid}", steps, true_map(run, i))
    for misfit in MISFITS if errors is not None else ():
        correlation = spearman(results[misfit], errors)
        calibration_figure(folder / f"{misfit}.png", results[misfit], errors, names, correlation)
