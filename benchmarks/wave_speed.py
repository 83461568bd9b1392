"""The simulator against the plain loop and deepwave: `python bench.py wave`."""

import ctypes
import os
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import waves
from options.fields import Options, Section
from system.devices import pick_device
from system.files import write_json
from waves.cpu import compiled
from waves.passes import BLOCK, MARGIN
from waves.reference import reference_simulate
from waves.windows import windows_of


def deepwave_simulate(vel, acquisition=waves.OPENFWI):
    """Simulate by deepwave, which comes within 0.2 to 3 % of the scheme: (B, Z, X) m/s -> (B, S, T, R).

    One call for each map: a call with several maps needs a copy of the map for every shot and takes longer.
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
    """A function that simulates maps and takes the gradient of the gathers' energy."""

    def run(vel):
        vel = vel.clone().requires_grad_()
        simulate(vel).square().sum().backward()

    return run


def two_maps(path):
    """The slowest and the fastest map of an .npy or .npz file, or two layered ones: {name: (Z, X) m/s}."""
    if not path:
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
    """Seconds that a call takes, work on the device included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_mib(run, device):
    """Peak memory of a call beyond what was in use before it; None if the system does not report it."""
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
        ctypes.CDLL(None).malloc_trim(
            0
        )  # memory that is free but not returned would hide what the call takes
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        held = kib("VmRSS")
    except (OSError, AttributeError, TypeError):  # not Linux with glibc
        return None
    run()
    return (kib("VmHWM") - held) / 1024


def memory_bandwidth(device):
    """Bytes per second read and written by copying 256 MiB."""
    a = torch.zeros(2**26, device=device)
    b = torch.zeros_like(a)
    return 2 * a.nbytes / min(seconds(lambda: b.copy_(a), device) for _ in range(7))


def active_updates(vel, acquisition=waves.OPENFWI):
    """Cell updates for all shots of a map: those that `waves` makes, and those of the full grid."""
    nz, nx = (n + 2 * acquisition.n_pad for n in vel.shape)
    steps = np.minimum(acquisition.n_samples - np.arange(0, acquisition.n_samples, BLOCK), BLOCK)
    fastest = int(np.ceil(vel.max().item() / 50) * 50)
    made = 0
    for source in acquisition.sources:
        windows, _ = windows_of(acquisition, nz, nx, source, fastest, MARGIN)
        made += ((windows[..., 1] - windows[..., 0]).sum(1) * steps).sum().item()
    return made, nz * nx * acquisition.n_samples * len(acquisition.sources)


WAVE = Section("wave", "simulation and its gradient against the plain loop and deepwave")


@dataclass
class WaveOptions(Options):
    """The options of `bench.py wave`."""

    maps: str = WAVE("", ".npy or .npz file of velocity maps; none = two layered ones", path=True)
    batch: tuple = WAVE((1, 8), "maps a call", items=int, above=0, most=10**4)
    who: tuple = WAVE(("ours", "plain", "deepwave"), "contenders: ours, plain, deepwave")
    repeats: int = WAVE(5, "turns", above=0, most=10**4)
    threads: int = WAVE(0, "CPU threads; 0 = torch's default", most=4096)
    device: str = WAVE("auto", "auto, cpu, cuda, mps", choices=("auto", "cpu", "cuda", "mps"))
    soak: int = WAVE(0, "> 0: instead simulate this many maps in a loop and watch the memory")
    json: str = WAVE("", "file to write every number to", writes="JSON")


def bench_wave(args):
    """Time simulation and its gradient against the plain loop and deepwave, taking turns."""
    if not args.who or not set(args.who) <= set(WaveOptions.who):
        raise ValueError(f"--who={','.join(args.who)}: expected some of {', '.join(WaveOptions.who)}")
    torch.set_num_threads(args.threads or torch.get_num_threads())
    device = pick_device(args.device)
    if args.soak:
        return soak(args.soak, device)
    start = time.perf_counter()
    if device.type == "cpu":
        compiled()
    compile_s = time.perf_counter() - start
    contenders = {"ours": waves.simulate, "plain": reference_simulate}
    try:
        import deepwave  # noqa: F401

        contenders["deepwave"] = deepwave_simulate
    except ImportError:
        print("deepwave is not installed (pip install deepwave): its rows are left out")
    contenders = {name: contenders[name] for name in args.who if name in contenders}
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
        write_json(args.json, result)


def compare(contenders, vels, gradient, repeats, made, full, bandwidth, name):
    """Time the simulators in turns on one batch; print and return a row for each."""
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
        if who != "deepwave":  # deepwave's grid and algorithm differ
            updates = (made if who == "ours" else full) * (
                3 if gradient else 1
            )  # forward twice, adjoint once
            n_bytes = 16  # read p, p_old, alpha and write p_old, if all came from memory
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


def resident():
    """The memory in use as text, if the system reports it."""
    try:
        n_pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # not Linux
        return "this system does not report memory in use"
    return f"{n_pages * os.sysconf('SC_PAGE_SIZE') / 2**20:7.1f} MiB resident"


def soak(n_maps, device, batch=20):
    """Simulate n_maps random layered maps in a loop and print the memory in use."""
    generator = torch.Generator().manual_seed(0)
    start = time.perf_counter()
    for done in range(0, n_maps, batch):
        layers = 1500 + 3000 * torch.rand(batch, 7, generator=generator)
        seis = waves.simulate(layers.repeat_interleave(10, 1)[:, :, None].expand(-1, -1, 70).to(device))
        assert seis.isfinite().all()
        if done % max(batch, n_maps // 10 // batch * batch) == 0 or done + batch >= n_maps:
            print(f"{done + batch:6} maps {time.perf_counter() - start:7.1f} s  {resident()}", flush=True)
