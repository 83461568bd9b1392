"""Networks compared at equal training cost: `python bench.py ablation --train=DIR --test=DIR`.

A run trains for a budget of CPU seconds of one thread (`time.process_time`, so that waiting for other
programs costs nothing) and anneals its learning rate over the budget.
"""

import json
import math
import re
import statistics
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from cfg import Config, parse
from data import load_items, mean_map
from model import check_model
from openfwi.files import read_sample
from openfwi.modes import preprocess
from options.fields import Options, Section
from parallel.processes import processes
from report.figures import new_figure, save_figure
from report.scores import ssim
from system.files import append_json, read_lines
from train import train_epoch
from training.guards import BadSteps
from training.loader import PairDataset, make_loaders
from training.log import Log
from training.runs import environment
from training.trainer import Trainer
from utils import seed_all

# Options of cfg.py: one learning rate for all networks, tuned for none. The budget ends a run, and nothing is
# logged or saved on the way.
COMMON = "lr=1e-3 min_lr=1e-5 weight_decay=0.05 batch_size=8 pretrained=false precision=float32 device=cpu "
COMMON += "threads=1 workers=0 epochs=1000000 log_every=1000000000 save_minutes=1e9"
BASELINE = "arch=unet backbone=convnext_atto head=crop"
OURS = "arch=seisnext head=perfect decoder_norm=batch input_scaling=signed_log"
OF_OURS = (
    *("upsample=pixelshuffle", "upsample=nearest", "scse=true", "skip_convs=true", "decoder_norm=none"),
    *("decoder_norm=instance", "out_level=1", "fusion=true", "deep_supervision=true", "confidence=true"),
    *("bounded=true", "classify_family=true", "input_scaling=none", "input_scaling=time_gain"),
    *("smoothness=0.05", "smoothness=0.05 smoothness_edge=100", "flip_p=0"),
)
GROUPS = {  # the others of a group are compared with its first
    "main": {
        "baseline": BASELINE,
        **{name: f"{BASELINE} {name}" for name in ("mode=smart_256x72", "mode=small_72x72")},
        "input_scaling=signed_log": f"{BASELINE} input_scaling=signed_log",
        "inversionnet": "arch=inversionnet",
        "ours": OURS,
    },
    "options": {"ours": OURS, **{name: f"{OURS} {name}" for name in OF_OURS}},
}
WARMUP_SHARE = 0.05  # of the budget, linear; the cosine takes the rest
MARKS = (0.25, 0.5, 1.0)  # shares of the budget at which the error is measured for the figure
CURVE_STRIDE = 5  # for the figure, every fifth test map is used
ABLATION = Section("ablation", "networks at equal training cost")


@dataclass
class AblationOptions(Options):
    """The options of `bench.py ablation`."""

    train: str = ABLATION("", "folder with the training files; none = only report", path=True)
    test: str = ABLATION("", "folder with the test files", path=True)
    results: str = ABLATION("ablation.jsonl", "file with a line for each finished run", writes="JSON")
    group: str = ABLATION("main", "networks to compare: main, options", choices=("main", "options"))
    budget: float = ABLATION(120.0, "CPU seconds of training for each run", above=0)
    seeds: tuple = ABLATION((0, 1, 2), "a run of each network for each seed", items=int)
    n_test: int = ABLATION(100, "test maps of each family, evenly spaced", above=0)
    figure: str = ABLATION("", "draw the figure into this .png", writes="picture")


class Budget:
    """Takes the place of `guards.Stop` and `optim.Schedule`: CPU seconds set the rate and end the run.

    `measure()` is called as each of the MARKS is passed, and its time does not count.
    """

    def __init__(self, trainer, budget_s, measure):
        self.trainer, self.budget_s, self.measure = trainer, budget_s, measure
        self.spent_s, self.curve = 0.0, []
        self.set(0)
        self.started_s = time.process_time()

    def set(self, step):
        """Set the learning rate for the CPU seconds spent so far."""
        cfg, share = self.trainer.cfg, min(1.0, self.spent_s / self.budget_s)
        fall = max(0.0, share - WARMUP_SHARE) / (1 - WARMUP_SHARE)
        warm = min(1.0, share / WARMUP_SHARE)
        for group in self.trainer.optimizer.param_groups:
            group["lr"] = max(cfg.min_lr, cfg.lr * warm * (1 + math.cos(math.pi * fall)) / 2)

    def agree(self):
        """Count the CPU seconds of the last step; returns whether the budget is spent."""
        self.spent_s += time.process_time() - self.started_s
        self.set(self.trainer.step)
        n_passed = sum(self.spent_s >= mark * self.budget_s for mark in MARKS) - len(self.curve)
        if n_passed:
            self.curve += [(self.spent_s, self.measure())] * n_passed
        self.started_s = time.process_time()
        return self.spent_s >= self.budget_s


def spread(items, n):
    """Up to `n` evenly spaced items of each family."""
    chosen = []
    for family in dict.fromkeys(pair.family for pair, _ in items):
        mine = [item for item in items if item[0].family == family]
        n_mine = min(n, len(mine))
        chosen += [mine[int((k + 0.5) * len(mine) / n_mine)] for k in range(n_mine)]
    return chosen


@torch.no_grad()
def evaluate(network, items, mode):
    """MAE (m/s) and SSIM of each item, (n,) each, and the network's CPU seconds for one."""
    network.eval()
    errors, similarities, forward_s = [], [], 0.0
    for seis, vel, _, _ in DataLoader(PairDataset(items), batch_size=8):
        seis = preprocess(seis.float(), mode)
        started_s = time.process_time()
        prediction = network(seis)
        forward_s += time.process_time() - started_s
        errors.append((prediction - vel).abs().mean((1, 2, 3)))
        similarities.append(ssim(prediction, vel))
    return torch.cat(errors), torch.cat(similarities), forward_s / len(items)


def configuration(options, seed):
    """The Config of a variant, given its options as in `GROUPS`."""
    return parse([f"--{word}" for word in f"{COMMON} {options} seed={seed}".split()])


def run_variant(cfg, process, budget_s, train_items, test_items):
    """Train one configuration for `budget_s` CPU seconds and score its averaged weights: a dictionary."""
    seed_all(cfg.seed)
    loader, _ = make_loaders(cfg, process, train_items, test_items)
    trainer = Trainer(cfg, process, loader.batch_sampler.n_steps)
    network, mode = trainer.ema.module, cfg.mode
    some_items = test_items[::CURVE_STRIDE]
    with tempfile.TemporaryDirectory() as folder:
        log = Log(Path(folder), trainer)
        bad_steps = BadSteps(trainer, train_items, log.folder)
        budget = Budget(trainer, budget_s, lambda: evaluate(network, some_items, mode)[0].mean().item())
        trainer.schedule = budget
        while budget.spent_s < budget_s:
            train_epoch(trainer, loader, log, bad_steps, budget, None)
    errors, similarities, forward_s = evaluate(network, test_items, mode)
    by_family = defaultdict(list)
    for (pair, _), error in zip(test_items, errors.tolist(), strict=True):
        by_family[pair.family].append(error)
    n_samples = trainer.step * trainer.global_batch
    return {
        **{"mae": errors.mean().item(), "ssim": similarities.mean().item()},
        "family_mae": {name: statistics.mean(some) for name, some in by_family.items()},
        **{"curve": budget.curve, "spent_s": budget.spent_s, "samples": n_samples},
        **{"train_ms": 1e3 * budget.spent_s / n_samples, "infer_ms": 1e3 * forward_s},
        "parameters": sum(p.numel() for p in trainer.network.parameters()),
    }


# ---------------------------------------------------------------- tables and figure


def summary(records, group):
    """{variant: its records, ordered by seed} of one group, in the group's order."""
    found = defaultdict(list)
    for record in sorted(records, key=lambda r: r["seed"]):
        if record["group"] == group:
            found[record["variant"]].append(record)
    return {name: found[name] for name in GROUPS[group] if name in found}


def mean_std(values):
    """The mean, with the standard deviation if there are several seeds."""
    spread_out = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread_out}"


def table(records, group):
    """A Markdown table of one group: scores on the test maps, cost, paired differences from its first."""
    runs = summary(records, group)
    reference = next(iter(GROUPS[group]))
    first = {r["seed"]: r["mae"] for r in runs.get(reference, ())}
    families = list(next(iter(runs.values()))[0]["family_mae"])
    head = ["", *families, "MAE, m/s", f"against {reference}", "SSIM", "seeds", "samples seen", "ms training"]
    rows = [[*head, "ms inference", "M parameters"]]
    rows.append(["---"] * len(rows[0]))
    for name, mine in runs.items():
        pairs = [r["mae"] - first[r["seed"]] for r in mine if r["seed"] in first]
        rows.append([
            name,
            *(f"{statistics.mean(r['family_mae'][family] for r in mine):.1f}" for family in families),
            mean_std([r["mae"] for r in mine]),
            f"{mean_std(pairs)} ({min(pairs):+.0f} to {max(pairs):+.0f})" if pairs else "–",
            f"{statistics.mean(r['ssim'] for r in mine):.3f}",
            str(len(mine)),
            f"{statistics.mean(r['samples'] for r in mine):.0f}",
            *(f"{statistics.mean(r[key] for r in mine):.1f}" for key in ("train_ms", "infer_ms")),
            f"{mine[0]['parameters'] / 1e6:.2f}",
        ])  # fmt: skip
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def draw(path, records):
    """Draw MAE against training time of the main group, and final errors of the options, into `path`."""
    if not (fig := new_figure((12, 5))):
        return
    left, right = fig.subplots(1, 2)
    for name, runs in summary(records, "main").items():
        times, errors = ([[p[k] for p in r["curve"]] for r in runs] for k in (0, 1))
        time_s, error = ([statistics.mean(at) for at in zip(*some, strict=True)] for some in (times, errors))
        (line,) = left.plot(time_s, error, "o-", label=name)
        for t, at in zip(time_s, zip(*errors, strict=True), strict=True):
            left.plot((t, t), (min(at), max(at)), color=line.get_color(), alpha=0.5)
    left.set(xlabel="training (CPU s, one thread)", ylabel="MAE (m/s)", title="mean and range over seeds")
    left.axhline(records[0]["mean_map_mae"], color="grey", ls="--", label="mean map")
    left.legend(fontsize=8)
    options = list(summary(records, "options").items())[::-1]
    for y, (_, runs) in enumerate(options):
        right.plot([r["mae"] for r in runs], [y] * len(runs), "o", color="C5", alpha=0.6)
    right.set_yticks(range(len(options)), [name for name, _ in options], fontsize=8)
    right.set(xlabel="MAE (m/s)", title="options of ours, each seed")
    right.grid(axis="x")
    save_figure(fig, path)


def bench_ablation(args):
    """Train networks for equal CPU seconds and compare their errors on test maps.

    Each finished run appends a line to --results. You can stop it at any time: the same command continues
    with the runs that are missing there, then prints the tables and draws the figure.
    """
    if bool(args.train) != bool(args.test):
        raise ValueError("--train and --test go together; give both to run, neither to report")
    records = [json.loads(line) for line in read_lines(args.results)]
    if args.train:
        run_missing(args, records)
    if not records:
        raise ValueError(f"{args.results}: no results yet; give --train=DIR and --test=DIR")
    for group in GROUPS:
        if any(r["group"] == group for r in records):
            print(f"\n{group}, mean map {records[0]['mean_map_mae']:.1f} m/s\n\n{table(records, group)}")
    if args.figure:
        draw(args.figure, records)


def run_missing(args, records):
    """Run each variant and seed missing in `records`, seed by seed; add them there and to --results."""
    variants = GROUPS[args.group]
    known = {(r["variant"], r["seed"]): r for r in records if r["group"] == args.group}
    for name, options in variants.items():
        check_model(configuration(options, 0))
        mine = [r for (variant, _), r in known.items() if variant == name]
        if any((r["budget_s"], r["options"]) != (args.budget, options) for r in mine):
            raise ValueError(f"{args.results}: {name} ran with other options there; give another --results")
    missing = [(seed, name) for seed in args.seeds for name in variants if (name, seed) not in known]
    if not missing:
        return
    train_items, test_items = load_items(Config(data_root=(args.train,), val_root=(args.test,)))
    test_items = spread(test_items, args.n_test)
    reference = mean_map(train_items).numpy()
    errors = [float(abs(read_sample(*item)[1] - reference).mean()) for item in test_items]
    commit = re.search("commit: (.*)", environment(torch.device("cpu")))[1]
    for seed, name in missing:
        cfg = configuration(variants[name], seed)
        with processes(cfg) as process:
            found = run_variant(cfg, process, args.budget, train_items, test_items)
        key = {"group": args.group, "variant": name, "seed": seed, "budget_s": args.budget}
        key |= {"options": variants[name], "mean_map_mae": statistics.mean(errors), "commit": commit}
        records.append({**key, **found})
        append_json(args.results, records[-1])
        print(f"seed {seed}, {name}: {found['mae']:.1f} m/s, {found['samples']} samples seen", flush=True)
