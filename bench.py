"""Measure the project's parts: `python bench.py wave [--maps FILE] [--batch=1,8]`, `python bench.py train`.

Contenders take turns within one run, so that other load on the machine meets all alike; compare the ratios of
their medians rather than seconds from different runs.
"""

import argparse
import ctypes
import dataclasses
import functools
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import waves
from benchmarks import data_speed as bench_data
from benchmarks import inversion_quality as bench_inversion
from benchmarks import realism
from cfg import Config, parse
from data import whole
from inference.submission import HEADER, write_submission
from openfwi.files import find_pairs
from openfwi.npy import GATHER_SHAPE, MAP_SHAPE
from training.loader import make_loaders
from training.log import BadSteps, Log, peak_memory_gb
from training.trainer import Stop, Trainer, train_epoch
from utils import processes, run_program
from waves import engine


def reference_simulate(vel, acquisition=waves.OPENFWI, periodic=True):
    """The scheme of `waves`, written the obvious way: (B, Z, X) m/s -> (B, S, T, R).

    periodic=False puts zeros beyond the grid instead of its other side: wrong for OpenFWI's data.
    """
    acq, pad, (nz, nx) = acquisition, acquisition.n_pad, vel.shape[-2:]
    v_min = vel.amin((-2, -1))[:, None]
    d = v_min * acq.damping_per_velocity().to(vel) * acq.dt_s  # (B, pad), from the map outwards
    sides = [torch.cat([d.flip(1), d.new_zeros(len(d), n), d], 1) for n in (nz, nx)]
    inside = F.pad(torch.ones(nx, dtype=torch.bool, device=vel.device), (pad, pad))
    kappa = torch.where(inside, sides[0][:, :, None], sides[1][:, None, :])[:, None]
    alpha = (F.pad(vel[:, None], (pad,) * 4, mode="replicate") * acq.dt_s / acq.dx_m) ** 2
    source = torch.tensor(acq.sources, device=vel.device)
    gain = (vel[:, acq.source_row, source] * acq.dt_s) ** 2  # (B, S)
    wavelet = waves.ricker(acq.n_samples, vel.dtype, acq).to(vel.device)
    shot = torch.arange(len(source), device=vel.device)

    def advance(p, p_old, alpha, kappa, gain, begin, end):
        gather = []
        for n in range(begin, end):
            around = F.pad(p, (2,) * 4, mode="circular" if periodic else "constant")
            lap = 0
            for shift, weight in ((1, 4 / 3), (2, -1 / 12)):
                for z, x in ((-shift, 0), (shift, 0), (0, -shift), (0, shift)):
                    lap = lap + weight * (
                        around[..., 2 + z : 2 + z + p.shape[2], 2 + x : 2 + x + p.shape[3]] - p
                    )
            p_old, p = p, p + ((1 - kappa) * (p - p_old) + alpha * lap)
            p[:, shot, pad + acq.source_row, pad + source] += gain * wavelet[n]
            gather.append(p[:, :, pad + acq.receiver_row, pad : pad + nx])
        return p, p_old, torch.stack(gather, 2)

    p = p_old = vel.new_zeros(len(vel), len(source), *alpha.shape[-2:])
    gathers, block = [], advance
    if vel.requires_grad:  # keeps the graph of 20 steps, not of all
        block = functools.partial(checkpoint, advance, use_reentrant=True)
    for begin in range(0, acq.n_samples, 20):
        end = min(begin + 20, acq.n_samples)
        p, p_old, gather = block(p, p_old, alpha, kappa, gain, begin, end)
        gathers.append(gather)
    seis = torch.cat(gathers, 2)
    return seis if acq.receivers is None else seis[..., torch.tensor(acq.receivers, device=vel.device)]


def deepwave_simulate(vel, acquisition=waves.OPENFWI):
    """The nearest that deepwave comes, 0.2-3 % off: (B, Z, X) m/s -> (B, S, T, R).

    A call per map: several maps in one call need a copy of the map for every shot, which takes it longer.
    """
    import deepwave

    acq, n_shots = acquisition, len(acquisition.sources)
    wavelet = waves.ricker(acq.n_samples, vel.dtype, acq).to(vel.device).expand(n_shots, 1, -1)
    receivers = [[[acq.receiver_row, x] for x in acq.receivers or range(vel.shape[-1])]]
    options = {
        "source_amplitudes": wavelet,
        "source_locations": torch.tensor([[[acq.source_row, x]] for x in acq.sources], device=vel.device),
        "receiver_locations": torch.tensor(receivers, device=vel.device).expand(n_shots, -1, -1),
        "accuracy": 4,
        "pml_width": 20,
        "pml_freq": acq.peak_hz,
    }
    seis = torch.stack([deepwave.scalar(v, acq.dx_m, acq.dt_s, **options)[-1] for v in vel])
    return -F.pad(seis[..., 1:], (0, 1)).transpose(2, 3)  # negated, and recorded one sample later


def with_gradient(simulate):
    def run(vel):
        vel = vel.clone().requires_grad_()
        simulate(vel).square().sum().backward()

    return run


def two_maps(path):
    """The slowest and the fastest map of an .npy or .npz file, or two layered ones: {name: (Z, X) m/s}."""
    if path is None:
        layers = {"low": (1500, 1700, 1900, 2100, 2300), "high": (1500, 2200, 3000, 3800, 4500)}
        return {
            name: torch.tensor(v).float().repeat_interleave(14)[:, None].expand(70, 70)
            for name, v in layers.items()
        }
    loaded = np.load(path)
    arrays = [loaded[k] for k in loaded.files] if path.endswith("npz") else [loaded]
    arrays = [a.reshape(-1, 70, 70) for a in arrays if a.shape[-2:] == (70, 70)]
    if not arrays:
        raise ValueError(f"{path}: no maps of 70 x 70 cells in it; give OpenFWI velocity maps")
    maps = np.concatenate(arrays)
    fastest = maps.reshape(len(maps), -1).max(1)
    return {
        name: torch.from_numpy(maps[i]).float().reshape(maps.shape[-2:])
        for name, i in (("low", fastest.argmin()), ("high", fastest.argmax()))
    }


def seconds(run, device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_mib(run, device):
    """Memory that a call takes beyond what is held before it; None where the system does not tell."""
    if device.type == "cuda":
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - held) / 2**20

    def kib(name):
        return next(
            int(s.split()[1])
            for s in Path("/proc/self/status").read_text().splitlines()
            if s.startswith(name)
        )

    try:
        ctypes.CDLL(None).malloc_trim(0)  # what is free but held would hide what is taken
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        held = kib("VmRSS")
    except (OSError, AttributeError):  # not Linux with glibc
        return None
    run()
    return (kib("VmHWM") - held) / 1024


def memory_bandwidth(device):
    """Bytes per second read and written by copying 256 MiB."""
    a = torch.zeros(2**26, device=device)
    b = torch.zeros_like(a)
    return 2 * a.nbytes / min(seconds(lambda: b.copy_(a), device) for _ in range(7))


def active_updates(vel, acquisition=waves.OPENFWI):
    """Cell updates of a map's shots: those that `waves` makes, and those of the full grid."""
    nz, nx = (n + 2 * acquisition.n_pad for n in vel.shape)
    steps = np.minimum(
        acquisition.n_samples - np.arange(0, acquisition.n_samples, engine.BLOCK), engine.BLOCK
    )
    fastest = int(np.ceil(vel.max().item() / 50) * 50)
    made = 0
    for source in acquisition.sources:
        windows, _ = engine.windows_of(acquisition, nz, nx, source, fastest, engine.MARGIN)
        made += ((windows[..., 1] - windows[..., 0]).sum(1) * steps).sum().item()
    return made, nz * nx * acquisition.n_samples * len(acquisition.sources)


def bench_wave(args):
    """Simulation and its gradient against the plain loop and deepwave, by turns."""
    device = torch.device(args.device)
    start = time.perf_counter()
    if device.type == "cpu":
        engine.compiled()
    compile_s = time.perf_counter() - start
    contenders = {"ours": waves.simulate, "plain": reference_simulate}
    try:
        import deepwave  # noqa: F401

        contenders["deepwave"] = deepwave_simulate
    except ImportError:
        print("deepwave is not installed (pip install deepwave): its rows are left out")
    contenders = {name: contenders[name] for name in args.who.split(",") if name in contenders}
    bandwidth = memory_bandwidth(device)
    processor = (
        torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    )
    print(f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}", end=", ")
    print(f"copies {bandwidth / 1e9:.1f} GB/s, kernel compiled in {compile_s:.1f} s")
    print("s per map of 5 shots x 1000 samples, median; x: of deepwave's, or else of the plain loop's")
    print(
        f"{'map':5} {'batch':>5} {'pass':8} {'who':9} {'s/map':>8} {'x':>6} {'Gcells/s':>10} {'B/update':>8}",
        end="",
    )
    print(f" {'of copy':>7} {'MiB':>7}")
    rows = []
    for name, vel in two_maps(args.maps).items():
        made, full = active_updates(vel)
        for batch in args.batch:
            vels = vel.to(device).expand(batch, -1, -1).contiguous()
            for gradient in (False, True):
                rows += compare(contenders, vels, gradient, args.repeats, made, full, bandwidth, name)
    if args.json:
        result = {"device": processor, "threads": torch.get_num_threads(), "torch": torch.__version__}
        result |= {"copy_bytes_per_s": bandwidth, "compile_s": compile_s, "rows": rows}
        Path(args.json).write_text(json.dumps(result, indent=1))


def compare(contenders, vels, gradient, repeats, made, full, bandwidth, name):
    """Time the contenders by turns on one batch; print and return a row for each."""
    runs, took, rows = {}, {}, []
    for who, simulate in contenders.items():
        run = with_gradient(simulate) if gradient else simulate
        runs[who], took[who] = (lambda run=run: run(vels)), []
        if who != "plain":
            runs[who]()  # warm up
    for repeat in range(repeats):
        for who, run in runs.items():
            if who != "plain" or repeat == 0:
                took[who].append(seconds(run, vels.device) / len(vels))
    medians = {who: statistics.median(t) for who, t in took.items()}
    base = medians.get("deepwave", medians.get("plain", medians["ours"]))
    for who, run in runs.items():
        row = {"map": name, "v_max": vels.max().item(), "batch": len(vels), "gradient": gradient, "who": who}
        row |= {"s_per_map": medians[who], "ratio": medians[who] / base, "all_s_per_map": took[who]}
        row |= {"peak_mib": None if who == "plain" else peak_mib(run, vels.device)}
        text = f"{name:5} {len(vels):5} {'gradient' if gradient else 'forward':8} {who:9} {medians[who]:8.4f}"
        text += f" {row['ratio']:6.2f}"
        if who != "deepwave":  # whose grid and algorithm differ
            updates = (made if who == "ours" else full) * (
                3 if gradient else 1
            )  # forward twice, adjoint once
            n_bytes = 16  # read p, p_old, alpha; write p_old: if each came from memory
            row |= {"updates_per_s": updates / medians[who], "share_of_grid": updates / full}
            row |= {"bytes_per_update": n_bytes, "share_of_copy": n_bytes * row["updates_per_s"] / bandwidth}
            text += f" {row['updates_per_s'] / 1e9:10.2f} {n_bytes:8} {row['share_of_copy']:7.2f}"
        else:
            text += f" {'-':>10} {'-':>8} {'-':>7}"
        print(
            text + (f" {row['peak_mib']:7.0f}" if row["peak_mib"] is not None else f" {'-':>7}"), flush=True
        )
        rows.append(row)
    return rows


def soak(n_maps, device, batch=20):
    """Simulate n_maps random layered maps in a loop and print the memory in use."""
    generator = torch.Generator().manual_seed(0)
    start = time.perf_counter()
    for done in range(0, n_maps, batch):
        layers = 1500 + 3000 * torch.rand(batch, 7, generator=generator)
        seis = waves.simulate(layers.repeat_interleave(10, 1)[:, :, None].expand(-1, -1, 70).to(device))
        assert seis.isfinite().all()
        if done % max(batch, n_maps // 10 // batch * batch) == 0 or done + batch >= n_maps:
            mib = int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20
            print(
                f"{done + batch:6} maps {time.perf_counter() - start:7.1f} s  {mib:7.1f} MiB resident",
                flush=True,
            )


def bench_train(args, options):
    """Our training loop against forward, loss, backward and step of the same network on fixed tensors."""
    cfg = parse(["--preset=demo", f"--batch_size={Config.batch_size}", *options])
    cfg = dataclasses.replace(cfg, log_every=10**9, save_minutes=10**9, synth_per_family=0)
    with tempfile.TemporaryDirectory() as folder, processes(cfg) as process:
        n = cfg.batch_size * args.steps
        rng = np.random.default_rng(0)
        for name, shape, kind in (("data", GATHER_SHAPE, np.float16), ("model", MAP_SHAPE, np.float32)):
            values = rng.standard_normal((n + 1, *shape), np.float32)
            Path(folder, "FlatVel_A", name).mkdir(parents=True)
            np.save(
                Path(folder, "FlatVel_A", name, f"{name}1.npy"),
                (3000 + values if kind == np.float32 else values).astype(kind),
            )
        items = whole(find_pairs([folder]))
        loader, _ = make_loaders(cfg, process, items, items)
        trainer, bare = Trainer(cfg, process, args.steps), Trainer(cfg, process, args.steps)
        log = Log(Path(folder), trainer)
        bad_steps, stop = BadSteps(trainer, items, log.folder), Stop(process)
        fixed = bare.prepare(0, *next(iter(loader))[:3])

        def ours():
            train_epoch(trainer, loader, log, bad_steps, stop, None)

        def plain():
            for _ in range(args.steps):
                bare.forward.train()
                with bare.autocast():
                    prediction = bare.forward(fixed[0])
                F.l1_loss(prediction, fixed[1]).backward()
                bare.optimizer.step()
                bare.optimizer.zero_grad(set_to_none=True)

        ours(), plain()  # warm up
        log.reset()
        times = {"ours": [], "bare": []}
        for _ in range(args.repeats):
            times["ours"].append(seconds(ours, process.device))
            times["bare"].append(seconds(plain, process.device))
        stop.restore()
    step_ms = {name: 1e3 * statistics.median(t) / args.steps for name, t in times.items()}
    overhead = statistics.median(a / b for a, b in zip(times["ours"], times["bare"], strict=True)) - 1
    waited = log.data_s / sum(times["ours"])
    print(
        f"{cfg.arch}, {args.steps} steps of {cfg.batch_size} a turn, {trainer.precision} on {process.device}"
    )
    print(
        f"our loop {step_ms['ours']:.1f} ms a step, bare {step_ms['bare']:.1f} ms: overhead {overhead:+.1%}"
    )
    print(
        f"waiting for data {waited:.1%} | {1e3 * cfg.batch_size / step_ms['ours']:.0f} samples/s | "
        f"{peak_memory_gb(process.device):.1f} GB"
    )
    if args.json:
        result = {"step_ms": step_ms, "overhead": overhead, "data_share": waited, "times_s": times}
        Path(args.json).write_text(json.dumps(result, indent=1))


def bench_csv(n):
    """Write n maps as the competition's CSV; the first ones by a simple writer too, which must agree."""
    maps = np.random.default_rng(0).uniform(1500, 4500, (64, 70, 70)).astype(np.float32)
    oids = [f"{i:010x}" for i in range(n)]

    def simple():
        lines = [HEADER]
        for oid, vel in zip(oids, maps, strict=False):
            for y, row in enumerate(vel.astype(float)):
                lines.append(f"{oid}_y_{y}," + ",".join(f"{v:.2f}" for v in row[1::2]) + "\n")
        return "".join(lines).encode()

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "submission.csv")
        cpu = torch.device("cpu")
        simple_s = seconds(simple, cpu) * n / len(maps)
        ours_s = seconds(lambda: write_submission(path, oids, [maps[i % len(maps)] for i in range(n)]), cpu)
        with open(path, "rb") as file:
            expected = simple()
            assert file.read(len(expected)) == expected, "the two writers disagree"
        n_bytes = path.stat().st_size
    print(f"{70 * n} rows, {n_bytes / 1e9:.2f} GB: {ours_s:.1f} s, {n_bytes / ours_s / 1e6:.0f} MB/s; "
          f"a simple writer would take {simple_s:.0f} s; identical bytes")  # fmt: skip


def main(argv):
    """Run the benchmark that the first argument names."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    what = parser.add_subparsers(dest="what", required=True)
    sub = what.add_parser("wave", help="simulation and its gradient against the plain loop and deepwave")
    sub.add_argument(
        "--maps", metavar="FILE", help=".npy or .npz of velocity maps; default: two layered ones"
    )
    sub.add_argument("--batch", type=lambda s: [int(b) for b in s.split(",")], default=[1, 8], metavar="1,8")
    sub.add_argument("--who", default="ours,plain,deepwave", help="contenders, of ours, plain and deepwave")
    sub.add_argument("--repeats", type=int, default=5)
    sub.add_argument("--threads", type=int, default=torch.get_num_threads())
    sub.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    sub.add_argument(
        "--soak", type=int, metavar="N", help="instead simulate N maps in a loop and watch the memory"
    )
    sub.add_argument("--json", metavar="FILE", help="write every number there")
    sub = what.add_parser(
        "train", help="our training loop against a bare one; other words are cfg.py's options"
    )
    sub.add_argument("--steps", type=int, default=16, help="a turn")
    sub.add_argument("--repeats", type=int, default=7)
    sub.add_argument("--json", metavar="FILE", help="write every number there")
    sub = what.add_parser("csv", help="the submission's writer against a simple one")
    sub.add_argument("--n", type=int, default=65_818, help="gathers; the competition's")
    sub = what.add_parser("data", help="the loader against bare reading of the same files")
    bench_data.add_arguments(sub)
    sub = what.add_parser("realism", help="a network trained to tell real maps from synthetic ones")
    realism.add_arguments(sub)
    sub = what.add_parser("inversion", help="waveform inversion from several starts and through noise")
    bench_inversion.add_arguments(sub)
    args, options = parser.parse_known_args(argv)
    if args.what == "train":
        return bench_train(args, options)
    if options:
        parser.error(f"unknown option {options[0]}")
    if args.what == "csv":
        return bench_csv(args.n)
    if args.what == "data":
        return bench_data.bench_data(args)
    if args.what == "realism":
        return realism.bench_realism(args)
    if args.what == "inversion":
        return bench_inversion.bench_inversion(args)
    torch.set_num_threads(args.threads)
    if args.soak:
        soak(args.soak, args.device)
    else:
        bench_wave(args)


if __name__ == "__main__":
    run_program(main)
