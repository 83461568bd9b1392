"""Predict velocity maps: `python infer.py --ckpt runs/001-baseline/best.pt --input DIR --out submission.csv`.

Without --ckpt, the network in weights/ predicts. --input takes Kaggle test gathers, one .npy of (5, 1000, 70)
each, OpenFWI files of (n, 5, 1000, 70), or folders of either. Each network predicts all gathers; the
predictions are joined, post-processed, refined against the observed gathers and written. You can stop the
program at any time: results are kept in `<out>.work/` until the output is complete, and the same command
continues where it stopped. Every card is used, and `torchrun … infer.py` uses many machines that share a
folder. Options: `--help`.
"""

import json
from pathlib import Path

import numpy as np
import torch

from cfg import INFER, MAPS, PREDICTIONS, parse
from inference.outputs import output_folders, write_outputs, write_pairs
from inference.pseudo import check_root
from inference.refine import Refiner, check_method, in_order
from inference.results import GATHER_FIELDS, Work, fingerprint, forget_changed
from inference.run import Run
from inference.submission import MAP_FIELD, check_velocities
from inference.tta import predict_views
from networks.checkpoints import shipped_weights
from openfwi.gathers import find_gathers
from parallel.launch import launch
from parallel.processes import processes
from parallel.work import check_same, from_main, made_on_all
from postprocess import check_steps, fit_statistics, fit_weights, fuse, try_steps
from report.scores import error_table, mae_of
from system.files import check_writable, write_atomic
from training.launch import check_compile, memory_explained
from utils import StopSignals, check_family, run_program
from waves.misfit import MISFITS, WARNINGS, compare, simulated


def infer(cfg, process):
    """Predict every gather of `cfg.input` into `cfg.out`; rank 0 returns the score, {} without --truth.

    All processes take batches in turn; whatever needs every result is done by rank 0. Raises ValueError,
    before any work, for options and files that do not fit together or differ between processes.
    """

    def prepare():
        check_options(cfg)
        return Run(cfg, process)

    run = made_on_all(process, prepare)
    check_same(process, made_on_all(process, run.seen))
    score = {}
    with Work(cfg.out, process) as run.work, StopSignals("the current batch, to keep it") as run.stop:
        predictions = [predict(run, k) for k in range(len(run.ensemble.members))]
        if cfg.fit:
            run.ensemble.weights, run.fitted = from_main(
                process, fit(run, predictions) if process.is_main else None, run.stop.check
            )
        results = finish(run, predictions)
        if process.is_main:
            score = write_outputs(run, predictions, results)
        if cfg.pseudo:
            write_pairs(run, predictions, results)
        if process.is_main:
            run.work.remove()
    return score


def check_options(cfg):
    """Raise ValueError for options that cannot work, before anything is read."""
    if Path(cfg.out).is_dir():
        raise ValueError(f"{cfg.out}: is a folder; give a file by --out=FILE.csv")
    for folder in output_folders(cfg):
        check_writable(folder)
    check_steps([name for name in cfg.post if name != "auto"], bool(cfg.use or cfg.fit))
    check_method(cfg.refine)
    check_family(cfg.pseudo_family)
    if cfg.pseudo and not Path(f"{cfg.out}.work").exists():
        check_root(cfg.pseudo)
    if "auto" in cfg.post and not (cfg.use or cfg.fit):
        raise ValueError("--post=auto uses what a --fit found to help; give its file by --use=FILE")
    if cfg.fit and (cfg.use or not cfg.truth):
        raise ValueError("--fit needs the true maps, --truth=DIR, and no --use")


# ---------------------------------------------------------------- the stages, each for all gathers


def predict(run, k):
    """Predict all gathers by network k: the map of joined views, each view's error, the recognised family."""
    cfg, ensemble, member = run.cfg, run.ensemble, run.ensemble.members[k]
    job = run.decided_by(PREDICTIONS, member.cfg) | {"checkpoint": fingerprint(member.path)}
    job |= {"recognises": run.needs_families}
    fields = [MAP_FIELD, ("errors", "f8", (len(ensemble.views),)), ("family", "i1"), *GATHER_FIELDS]
    results = run.results(f"network{k}", job, fields, lambda kept: forget_changed(kept, run.gathers))
    batches = results.todo(in_order(range(len(run.gathers)), cfg.batch_size))
    if not batches:
        return results
    member.load()
    with run.taking(results, batches, member.path.name) as (mine, bar):
        for numbers, seis, digests in run.read(mine):
            views = predict_views(member, seis, ensemble.views, member.mode)
            vel = fuse(views, [view.weight for view in ensemble.views], cfg.combine).cpu().numpy()
            check_velocities(vel, [run.gathers[i] for i in numbers], f"{member.path} predicts")
            results.put(
                numbers,
                vel=vel,
                errors=run.errors(views, numbers),
                family=member.families(seis).cpu().numpy() if run.needs_families else -1,
                gather=digests,
                stamp=[run.gathers[i].stamp for i in numbers],
            )
            bar.update(len(numbers))
    if len(ensemble.members) > 1:
        member.load("cpu")  # one after another: the next may need the memory
    return results


def fit(run, predictions):
    """Fit ensemble weights, statistics and helpful steps to all predictions, and write them to `cfg.fit`.

    Returns (the weights, all that was fitted).
    """
    cfg, ensemble = run.cfg, run.ensemble
    numbers = np.arange(len(run.gathers))
    truth = run.truth(numbers)
    if not cfg.ensemble_weights and len(predictions) > 1:
        maps = torch.stack([torch.from_numpy(np.array(p["vel"])) for p in predictions])
        ensemble.weights = fit_weights(maps, truth)
    vel = ensemble.join(predictions, numbers)
    errors, steps, chain_errors = try_steps(vel, truth, ensemble.families(predictions, numbers))
    columns = {"as it is": mae_of(vel, truth), **errors, "auto": chain_errors}
    print(error_table(columns, [family for *_, family in run.truths]))
    print(f"--post=auto: {', '.join(steps) or 'no step helps'}")
    fitted = {"ensemble_weights": ensemble.weights, "statistics": fit_statistics(vel, truth)}
    fitted |= {"post": steps, "checkpoints": [str(m.path) for m in ensemble.members], "maps": len(truth)}
    with write_atomic(cfg.fit, "w") as file:
        json.dump(fitted, file)
    weights = ", ".join(f"{w:.3f}" for w in ensemble.weights)
    print(f"weights {weights}; fitted on {len(truth)} maps -> {cfg.fit}")
    return ensemble.weights, fitted


def finish(run, predictions):
    """Join, post-process and refine the predictions: final maps with their errors and misfits."""
    cfg, ensemble, n = run.cfg, run.ensemble, len(run.gathers)
    job = run.decided_by(MAPS, cfg) | {"networks": [p.path.stem for p in predictions]}
    job |= {"weights": ensemble.weights, "steps": run.steps, "statistics": run.fitted.get("statistics")}
    job |= {"misfit": run.needs_misfit}
    fields = [MAP_FIELD, ("errors", "f8", (len(run.stages),)), ("refined", "?"), GATHER_FIELDS[0]]
    fields += [*((name, "f8") for name in MISFITS), *((name, "?") for name in WARNINGS)]
    expected = predictions[0]["gather"]

    def forget(kept):
        kept.forget((kept["gather"] != expected).any(1))
        if cfg.refine != "none":
            Refiner(run.process, cfg, kept).forget_unfinished()

    results = run.results("final", job, fields, forget)
    batches, refiner = in_order(range(n), cfg.batch_size), None
    if cfg.refine != "none":
        refiner = Refiner(run.process, cfg, results)
        for member in ensemble.members:
            member.load()
        order = by_gain(run, predictions, refiner, job) if refiner.has_budget else range(n)
        batches = refiner.batches(order)
    batches, misfits = results.todo(batches), []
    with run.taking(results, batches, "final", disable=not run.needs_misfit) as (mine, bar):
        gathers = ((numbers, None, None) for numbers in mine)
        if run.needs_misfit:
            gathers = run.read(mine, expected, is_slow=refiner is not None)
        for numbers, seis, _ in gathers:
            families = ensemble.families(predictions, numbers)
            maps, more = [ensemble.join(predictions, numbers).to(run.device)], {}
            maps += run.processed(maps[0], families)
            if refiner:
                vel, more["refined"] = refiner(run.model(families), numbers, seis, maps[-1], families)
                maps.append(vel)
            vel = maps[-1].float().cpu().numpy()
            check_velocities(vel, [run.gathers[i] for i in numbers], f"{run.stages[-1]} gives")
            if run.needs_misfit:
                more |= {name: v.cpu().numpy() for name, v in compare(seis, simulated(maps[-1])).items()}
            results.put(numbers, vel=vel, errors=run.errors(maps, numbers), gather=expected[numbers], **more)
            if run.needs_misfit:
                misfits += more["misfit"].tolist()
                bar.set_postfix(median_misfit=f"{np.median(misfits):.2g}")
            bar.update(len(numbers))
    return results


def by_gain(run, predictions, refiner, job):
    """The numbers of all gathers, those first for which refining promises the greatest gain per minute."""
    n, expected = len(run.gathers), predictions[0]["gather"]
    fields = [("gain", "f8"), GATHER_FIELDS[0]]
    results = run.results("gain", job, fields, lambda kept: kept.forget((kept["gather"] != expected).any(1)))
    batches = results.todo(in_order(range(n), run.cfg.batch_size))
    with run.taking(results, batches, "gain") as (mine, bar):
        for numbers, seis, digests in run.read(mine, expected):
            vel = run.ensemble.join(predictions, numbers).to(run.device)
            maps = [vel, *run.processed(vel, run.ensemble.families(predictions, numbers))]
            gain = refiner.method.gain(seis, maps[-1]).cpu().numpy()
            results.put(numbers, gain=gain, gather=digests)
            bar.update(len(numbers))
    return np.argsort(-results["gain"], kind="stable").tolist()


def main(argv):
    """Predict the gathers in --input; without --ckpt, by the network in weights/.

    Raises ValueError without --input.
    """
    cfg = parse(argv, INFER)
    if not cfg.input:
        raise ValueError("--input=PATH is needed: python infer.py --input FILE|DIR --out FILE.csv")
    launch(cfg, __file__, argv, lambda: len(find_gathers(cfg.input)))
    is_given = bool(cfg.ckpt)
    cfg.ckpt = cfg.ckpt or str(shipped_weights())
    with processes(cfg, "gloo") as process, memory_explained(cfg, process.device, is_training=False):
        check_compile(cfg, process.device)
        if process.is_main and not is_given:
            print(f"no --ckpt: the network is {cfg.ckpt}", flush=True)
        infer(cfg, process)


if __name__ == "__main__":
    run_program(main)
