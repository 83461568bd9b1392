"""Predict velocity maps: `python infer.py --ckpt runs/001-full/best.pt --input DIR --out submission.csv`.

--input takes Kaggle test gathers, one .npy of (5, 1000, 70) each, OpenFWI files
of (n, 5, 1000, 70), or folders of either. Each network predicts all gathers;
the predictions are joined, post-processed, refined against the wave equation
and written. Results lie in `<out>.work/` until the output is complete: the same
command goes on where it was stopped. Options in cfg.py.
"""

import dataclasses
import json
import os
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from cfg import NETWORK_FIELDS, parse
from inference.ensemble import Member, shares
from inference.pseudo import check_root, write_pseudo
from inference.refine import REFINE, inversion_batches
from inference.results import Work, fingerprint
from inference.submission import MAP_FIELD, write_submission
from inference.tta import make_views, predict, predict_views
from inversion.invert import expected_gain
from openfwi.gathers import GatherDataset, check_values, find_gathers, find_truths, read_truth
from postprocess import check_steps, fit_statistics, fit_weights, fuse, load_fit, run_step, try_steps
from report.predictions import draw, draw_families, print_misfits, print_warnings, write_misfits
from report.scores import by_family, error_table, mae_of, score_table
from utils import FAMILIES, V_MAX, V_MIN, check_family, check_writable, processes, run_program, write_atomic
from waves.misfit import MISFITS, WARNINGS, compare, simulated


class Run:
    """One call of the program: what is predicted from what, and where results are kept."""

    def __init__(self, cfg, process):
        self.cfg, self.process, self.device = cfg, process, process.device
        self.out = Path(cfg.out)
        self.check_options()
        self.paths = [Path(p) for p in cfg.ckpt.split(",") if p]
        self.views = make_views(cfg.tta, cfg.tta_weights)
        self.fit = load_fit(cfg.use, len(self.paths)) if cfg.use else None
        self.gathers = find_gathers(cfg.input)
        check_values(self.gathers)
        self.truths = find_truths(cfg.truth, self.gathers) if cfg.truth else None
        self.weights = shares(cfg.ensemble_weights, (self.fit or {}).get("ensemble_weights"), len(self.paths))
        self.members = [Member(cfg, path, process.device) for path in self.paths]
        self.work, self.spent_s = Work(self.out), 0.0
        files = {g.path: None for g in self.gathers} | {t[0]: None for t in self.truths or ()}
        self.files = fingerprint(files)

    def check_options(self):
        """Refuse what cannot end well before any work is done."""
        cfg = self.cfg
        if self.process.world > 1:
            raise ValueError(
                f"infer.py is one process, torchrun started {self.process.world}; start it by python"
            )
        if self.out.is_dir():
            raise ValueError(f"{cfg.out}: is a folder; give a file by --out=FILE.csv")
        for path in (cfg.out, cfg.fit):
            check_writable(Path(path or ".").parent)
        for folder in (cfg.save_maps, cfg.figures, cfg.pseudo):
            check_writable(folder or ".")
        check_steps([name for name in cfg.post if name != "auto"], bool(cfg.use or cfg.fit))
        check_family(cfg.pseudo_family)
        if cfg.pseudo and not Path(f"{cfg.out}.work").exists():
            check_root(cfg.pseudo)
        if "auto" in cfg.post and not (cfg.use or cfg.fit):
            raise ValueError("--post=auto uses what a --fit found to help; give its file by --use=FILE")
        if cfg.fit and (cfg.use or not cfg.truth):
            raise ValueError("--fit needs the true maps, --truth=DIR, and no --use")

    def loader(self, batches):
        """(numbers, seis) of each batch, read ahead."""
        return DataLoader(
            GatherDataset(self.gathers),
            batch_sampler=batches,
            num_workers=min(self.cfg.workers, os.cpu_count() or 1),
            pin_memory=self.device.type == "cuda",
        )

    def gather(self, i):
        return GatherDataset(self.gathers)[i][1].numpy()

    def truth(self, numbers):
        return torch.stack([read_truth(*self.truths[i][:2]) for i in numbers])

    # each stage goes through the batches that are not done

    def predict_all(self, k):
        """Results of checkpoint k: its views joined, each view's error, the family it recognises."""
        cfg, member, n = self.cfg, self.members[k], len(self.gathers)
        job = {name: getattr(member.cfg, name) for name in NETWORK_FIELDS}
        job |= {name: getattr(cfg, name) for name in ("tta", "tta_weights", "combine", "precision", "truth")}
        recognises = bool(cfg.post or cfg.fit or cfg.pseudo or cfg.refine != "none")  # costs another pass
        job |= {"files": self.files, "checkpoint": fingerprint([self.paths[k]]), "recognises": recognises}
        fields = [MAP_FIELD, ("errors", "f8", (len(self.views),)), ("family", "i1")]
        results = self.work.results(f"network{k}", job, n, fields)
        if not (todo := results.todo(cfg.batch_size)):
            return results
        weights = [view.weight for view in self.views]
        member.load()
        with tqdm(total=n, initial=n - sum(map(len, todo)), unit="map", desc=self.paths[k].name) as bar:
            for numbers, seis in self.loader(todo):
                seis = seis.to(self.device, non_blocking=True)
                maps = predict_views(member, seis, self.views, member.mode)
                errors = 0.0
                if self.truths:
                    truth = self.truth(numbers.tolist())
                    errors = torch.stack([mae_of(vel, truth) for vel in maps], 1).numpy()
                vel = fuse(maps, weights, cfg.combine).cpu().numpy()
                families = member.families(seis).cpu().numpy() if recognises else -1
                results.put(numbers.tolist(), vel=vel, errors=errors, family=families)
                bar.update(len(numbers))
        if len(self.members) > 1:
            member.load("cpu")  # one after another: the next one may need the room
        return results

    def joined(self, predictions, numbers):
        """The checkpoints' maps of some gathers, joined: (B, 1, 70, 70)."""
        maps = torch.stack([torch.from_numpy(p["vel"][numbers].astype(np.float32)) for p in predictions])
        return fuse(maps, self.weights, self.cfg.combine)

    def family_names(self, predictions, numbers=slice(None)):
        """The recognised families, None where none is: the first checkpoint's that tells."""
        found = np.full(len(self.gathers), -1)[numbers]
        for p in predictions:
            found = np.where(found < 0, p["family"][numbers], found)
        return [FAMILIES[i] if i >= 0 else None for i in found]

    def fit_all(self, predictions):
        """Weights, statistics and helpful steps from all predictions and truth, into `cfg.fit`."""
        numbers = np.arange(len(self.gathers))
        truth = self.truth(numbers)
        if not self.cfg.ensemble_weights and len(predictions) > 1:
            maps = torch.stack([torch.from_numpy(np.array(p["vel"])) for p in predictions])
            self.weights = fit_weights(maps, truth)
        vel = self.joined(predictions, numbers)
        errors, steps, chain_errors = try_steps(vel, truth, self.family_names(predictions))
        columns = {"as it is": mae_of(vel, truth), **errors, "auto": chain_errors}
        print(error_table(columns, [t[2] for t in self.truths]))
        print(f"--post=auto: {', '.join(steps) or 'no step helps'}")
        self.fit = {"ensemble_weights": self.weights, "statistics": fit_statistics(vel, truth), "post": steps}
        self.fit |= {"checkpoints": [str(path) for path in self.paths], "maps": len(truth)}
        with write_atomic(self.cfg.fit, "w") as file:
            json.dump(self.fit, file)
        weights = ", ".join(f"{w:.3f}" for w in self.weights)
        print(f"weights {weights}; fitted on {len(truth)} maps -> {self.cfg.fit}")

    def steps(self):
        """The post-processing steps in order, `auto` replaced by what was fitted."""
        return [s for name in self.cfg.post for s in (self.fit["post"] if name == "auto" else [name])]

    def processed(self, vel, families):
        """Maps after each post-processing step: [(B, 1, 70, 70), …], the last within OpenFWI's range."""
        stages = []
        for name in self.steps():
            vel = run_step(name, vel, families, (self.fit or {}).get("statistics"))
            stages.append(vel)
        return [*stages[:-1], stages[-1].clamp(V_MIN, V_MAX)] if stages else []

    def model(self, families):
        """The whole prediction as a function of full gathers: what feedback calls M."""

        def predict_again(seis):
            maps = [
                predict(member, seis, self.views, member.mode, self.cfg.combine) for member in self.members
            ]
            vel = fuse(torch.stack(maps), self.weights, self.cfg.combine)
            return (self.processed(vel, families) or [vel])[-1]

        return predict_again

    def finish_all(self, predictions):
        """The final maps, their errors after each stage, and what the wave equation says of them."""
        cfg, n = self.cfg, len(self.gathers)
        needs_misfit = bool(cfg.misfit or cfg.flag_worst or cfg.figures or cfg.pseudo or cfg.refine != "none")
        options = (
            "refine",
            "refine_rounds",
            "refine_step",
            "refine_minutes",
            "refine_iterations",
            "combine",
            "truth",
            "precision",
            "tta",
            "tta_weights",
        )
        job = {name: getattr(cfg, name) for name in options}
        job |= {
            "steps": self.steps(),
            "weights": self.weights,
            "statistics": (self.fit or {}).get("statistics"),
        }
        job |= {"misfit": needs_misfit, "files": self.files, "checkpoints": fingerprint(self.paths)}
        stages = ["network", *self.steps(), *([cfg.refine] if cfg.refine != "none" else [])]
        fields = [
            MAP_FIELD,
            ("errors", "f8", (len(stages),)),
            *((m, "f8") for m in MISFITS),
            *((w, "?") for w in WARNINGS),
        ]
        results = self.work.results("final", job, n, fields)
        misfits = []
        todo = results.todo(1 if cfg.refine == "inversion" else cfg.batch_size)
        if cfg.refine != "none":
            for member in self.members:
                member.load()
        if cfg.refine == "inversion":
            if cfg.refine_budget:
                todo = self.by_gain(todo, predictions)
            # a CPU gains a quarter at most by batches, and an interruption would lose more
            size = cfg.batch_size if self.device.type == "cuda" else 1
            todo = inversion_batches([i for (i,) in todo], self.family_names(predictions), size)
        batches = self.loader(todo) if needs_misfit else ((torch.tensor(numbers), None) for numbers in todo)
        with tqdm(
            total=n, initial=n - sum(map(len, todo)), unit="map", desc="final", disable=not needs_misfit
        ) as bar:
            for numbers, seis in batches:
                numbers = numbers.tolist()
                families = self.family_names(predictions, numbers)
                vel = self.joined(predictions, numbers).to(self.device)
                maps = [vel, *self.processed(vel, families)]
                if needs_misfit:
                    seis = seis.to(self.device, non_blocking=True)
                if cfg.refine != "none":
                    vel, traces = self.refined(seis, maps[-1], families)
                    self.keep_steps(numbers, [trace.pop("steps", ()) for trace in traces])
                    self.work.note("trace.jsonl", [self.gathers[i].oid for i in numbers], traces)
                    maps.append(vel)
                told = compare(seis, simulated(maps[-1])) if needs_misfit else {}
                told = {name: values.cpu().numpy() for name, values in told.items()}
                if self.truths:
                    truth = self.truth(numbers)
                    told["errors"] = torch.stack([mae_of(vel, truth) for vel in maps], 1).numpy()
                results.put(numbers, vel=maps[-1].float().cpu().numpy(), **told)
                if needs_misfit:
                    misfits += told["misfit"].tolist()
                    bar.set_postfix(median_misfit=f"{np.median(misfits):.2g}")
                bar.update(len(numbers))
        return results, stages

    def by_gain(self, todo, predictions):
        """Batches of one gather, those first whose inversion promises to gain most in its time."""
        self.spent_s = sum(note.get("seconds", 0) for note in self.work.notes("trace.jsonl").values())
        gains = []
        for numbers, seis in tqdm(self.loader(todo), desc="gains", unit="map"):
            families = self.family_names(predictions, numbers.tolist())
            vel = self.joined(predictions, numbers.tolist()).to(self.device)
            gains += expected_gain(
                seis.to(self.device), (self.processed(vel, families) or [vel])[-1]
            ).tolist()
        return [todo[i] for i in np.argsort(-np.array(gains), kind="stable")]

    def refined(self, seis, vel, families):
        """Maps after `cfg.refine`, and a dict each; as they are once the budget is spent."""
        cfg = self.cfg
        if cfg.refine == "inversion" and cfg.refine_budget:
            left = cfg.refine_budget - self.spent_s / 60
            if left <= 0:
                return vel, [{"kept": "guess", "why": "--refine_budget is spent"} for _ in vel]
            cfg = dataclasses.replace(cfg, refine_minutes=min(cfg.refine_minutes, left / len(seis)))
        vel, traces = REFINE[cfg.refine](self.model(families), seis, vel, families, cfg)
        self.spent_s += sum(trace.get("seconds", 0) for trace in traces)
        return vel, traces

    def keep_steps(self, numbers, courses):
        """Keep the maps on the way of an inversion for `--figures`, beside the other results."""
        for i, steps in zip(numbers if self.cfg.figures else (), courses, strict=False):
            if steps:
                with write_atomic(self.work.folder / f"steps{i}.npz") as file:
                    np.savez(file, **{f"{k:03} {what}": vel for k, (what, vel) in enumerate(steps)})

    def steps_of(self, i):
        """What `keep_steps` has kept of gather i: [(what, (70, 70) map), ...]."""
        path = self.work.folder / f"steps{i}.npz"
        if not path.exists():
            return []
        with np.load(path, allow_pickle=False) as file:
            return [(name[4:], file[name]) for name in file]

    def simulate(self, vel):
        """A map's gather: (1, 70, 70) -> (5, 1000, 70), as arrays."""
        return simulated(torch.from_numpy(vel)[None].to(self.device))[0].cpu().numpy()

    def write_all(self, predictions, results, stages):
        """The submission and all that was asked for beside it; returns the score where truth is given."""
        cfg, oids = self.cfg, [gather.oid for gather in self.gathers]
        errors = results["errors"][:, -1] if self.truths else None
        recognised = self.family_names(predictions)
        families = [t[2] for t in self.truths] if self.truths else recognised
        write_submission(self.out, oids, results["vel"][:, 0])
        for oid, vel in zip(oids if cfg.save_maps else (), results["vel"][:, 0], strict=False):
            with write_atomic(Path(cfg.save_maps) / f"{oid}.npy") as file:
                np.save(file, vel)
        if cfg.refine != "none":
            notes = self.work.notes("trace.jsonl")
            with write_atomic(self.out.with_suffix(".trace.jsonl"), "w") as file:
                file.writelines(json.dumps(notes[oid]) + "\n" for oid in oids)
        if cfg.misfit or cfg.flag_worst or cfg.figures or cfg.pseudo:
            write_misfits(self.out.with_suffix(".misfit.csv"), oids, results, families, errors)
            print_warnings(oids, results)
            print_misfits(results, errors)
        if cfg.figures:
            draw_families(cfg.figures, self, results, families, errors, self.simulate)
        if cfg.flag_worst:
            worst = np.argsort(-results["log_misfit"], kind="stable")[: cfg.flag_worst]
            for i in worst:
                print(f"do not trust {oids[i]}: log misfit {results['log_misfit'][i]:.3f}")
            draw(self.out.with_suffix(".worst.png"), worst, self, results, errors, self.simulate)
        if cfg.pseudo:
            good = np.flatnonzero(results["log_misfit"] <= cfg.pseudo_misfit)
            names = [recognised[i] or cfg.pseudo_family for i in good]
            maps = results["vel"][good]
            write_pseudo(cfg.pseudo, maps, names, cfg.batch_size, self.device)
            print(
                f"{len(good)} of {len(oids)} maps, log misfit at most {cfg.pseudo_misfit:g} -> {cfg.pseudo}"
            )
        print(f"{len(oids)} maps -> {self.out}")
        if not self.truths:
            return {}
        for path, p in zip(self.paths, predictions, strict=True):
            if len(self.views) > 1 or len(self.paths) > 1:
                views = {view.name: p["errors"][:, k] for k, view in enumerate(self.views)}
                print(f"{path}:\n{error_table(views, families)}")
        if len(stages) > 1:
            print(error_table({name: results["errors"][:, k] for k, name in enumerate(stages)}, families))
        score = by_family(errors, families)
        print(score_table(score))
        return score


def infer(cfg, process):
    """Predict every gather of `cfg.input` into `cfg.out`; returns the score where truth is given."""
    run = Run(cfg, process)
    predictions = [run.predict_all(k) for k in range(len(run.members))]
    if cfg.fit:
        run.fit_all(predictions)
    results, stages = run.finish_all(predictions)
    score = run.write_all(predictions, results, stages)
    run.work.remove()
    return score


def main(argv):
    """Predict what --input holds; raise ValueError where it or the checkpoint is not named."""
    cfg = parse(argv, "infer")
    for name in ("ckpt", "input"):
        if not getattr(cfg, name):
            raise ValueError(
                f"--{name}=PATH is needed: python infer.py --ckpt PATH --input FILE|DIR --out FILE.csv"
            )
    with processes(cfg) as process:
        infer(cfg, process)


if __name__ == "__main__":
    run_program(main)
