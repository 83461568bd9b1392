"""Passes through time of a batch of shots, for the equation of equation.py, and the choice of a kernel.

The Laplacian is symmetric. Therefore alpha x the adjoint field obeys the recursion of equation.py backwards
in time, driven by alpha x residual at the receivers; and a change of the field obeys it forwards, driven by
d_alpha lap p[n] - d_kappa (p[n] - p[n-1]). One kernel serves simulation, gradient and Jacobian-vector
product: `cpu.cpp` on a CPU with a C++ compiler, `cuda.py` (Triton) on CUDA, plain PyTorch elsewhere. A time
step updates only the cells that energy can have reached and can still return from.
"""

import functools
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from system.devices import to_device
from waves.cpu import compiled, run_cpp
from waves.passes import ADJOINT, BLOCK, MARGIN, PLAIN, STORE, TANGENT, warn_once
from waves.plain import run_torch
from waves.windows import windows_of


class Checkpoints(dict):
    """{first shot of a lane: fields at each block's start}; `torch.func` would copy a plain dictionary."""


class Job:
    """A batch of N = B x S shots in the kernels' layout, and the passes through time over them.

    Fields are (..., nz + 1, stride); cpu.cpp explains the spare row and columns. A lane is a set of shots
    that one kernel call advances: a single shot on a CPU, where every thread takes lane after lane so that
    its fields stay in cache, and all shots elsewhere.

    alpha: (B, Z, X), padded; v_min: (B,) m/s; drive: (B, S, T), added at the sources; v_max: m/s of each map.
    """

    def __init__(self, alpha, v_min, drive, acquisition, v_max):
        self.n_maps, self.nz, self.nx = alpha.shape
        self.n_sources, self.n_samples = drive.shape[1:]
        self.n_shots, self.pad = self.n_maps * self.n_sources, acquisition.n_pad
        self.stride = (
            self.nx + 15
        ) // 16 * 16 + 16  # rows start on cache lines, with room for the columns that wrap
        self.like, self.v_min, self.shape = alpha.detach(), v_min.detach(), drive.shape
        self.drive = drive.detach().contiguous().flatten(0, 1)
        self.alpha = self.layout(self.like)
        kappa = (
            to_device(acquisition.damping_per_velocity().to(alpha.dtype), alpha.device)
            * acquisition.dt_s
            * self.v_min[:, None]
        )  # (B, pad)
        self.kappa_z, kappa_x = (
            torch.cat([kappa.flip(1), kappa.new_zeros(self.n_maps, n - 2 * self.pad), kappa], 1)
            for n in (self.nz, self.nx)
        )
        self.kappa_x = F.pad(kappa_x, (0, self.stride - self.nx))
        self.source_row = acquisition.source_row + self.pad
        self.receiver_row = acquisition.receiver_row + self.pad
        self.sources = [s + self.pad for s in acquisition.sources] * self.n_maps
        self.shots = torch.arange(self.n_shots, device=alpha.device)
        self.maps = self.shots // self.n_sources
        self.source = self.source_row + 1, to_device(torch.tensor(self.sources), alpha.device)
        columns = acquisition.receivers or (0, self.nx - 2 * self.pad - 1)
        self.receivers = min(columns) + self.pad, max(columns) + self.pad
        fastest = [math.ceil(v / 50) * 50 for v in v_max]  # few values, so that cached windows are reused
        reach = torch.tensor(fastest, dtype=torch.float32) * acquisition.dt_s / acquisition.dx_m
        self.reach = to_device(reach, alpha.device)[self.maps]
        margin = MARGIN * alpha.element_size() // 4
        self.windows, self.bounds = zip(
            *(
                windows_of(acquisition, self.nz, self.nx, s, v, margin)
                for v in fastest
                for s in acquisition.sources
            ),
            strict=True,
        )
        self.kernel, lane = _kernel(alpha.device.type)
        self.lanes = [
            slice(i, i + (lane or self.n_shots)) for i in range(0, self.n_shots, lane or self.n_shots)
        ]
        self.blocks = [(n, min(n + BLOCK, self.n_samples)) for n in range(0, self.n_samples, BLOCK)]

    def layout(self, field):
        """A field (..., nz, nx) in the kernels' layout."""
        return F.pad(field, (0, self.stride - self.nx, 1, 0)).contiguous()

    def fields(self, *n):
        """Uninitialised fields of a lane: (shots, *n, nz + 1, stride)."""
        return self.empty(self.lanes[0].stop, *n, self.nz + 1, self.stride)

    def empty(self, *shape):
        """An uninitialised tensor that starts on a cache line."""
        if self.like.device.type != "cpu":
            return self.like.new_empty(shape)
        n = math.prod(shape)
        room = np.empty(n + 16, str(self.like.dtype)[6:])  # NumPy allocates huge pages, PyTorch does not
        start = -room.ctypes.data % 64 // room.itemsize
        return torch.from_numpy(room[start : start + n].reshape(shape))

    def over_lanes(self, work):
        """Call work(lanes) in every thread; together the threads take each lane once."""
        lanes = iter(self.lanes)
        n_threads = min(torch.get_num_threads(), len(self.lanes))
        if n_threads == 1:
            return work(lanes)
        with ThreadPoolExecutor(n_threads) as pool:
            for done in [pool.submit(work, lanes) for _ in range(n_threads)]:
                done.result()

    @functools.cached_property
    def active(self):
        """{first shot of a lane: for each block the index of the rows and columns that hold active cells}."""
        indices = {}
        for lane in self.lanes:
            bounds = np.stack(self.bounds[lane])  # (shots, blocks, 4)
            bounds = np.concatenate([bounds[..., :2].min(0), bounds[..., 2:].max(0)], 1)
            columns = [
                (a, b) if a > 1 and b < self.nx - 1 else (0, self.stride) for _, a, _, b in bounds.tolist()
            ]
            rows = [slice(top, bottom + 1) for top, _, bottom, _ in bounds.tolist()]
            indices[lane.start] = [(..., z, slice(*x)) for z, x in zip(rows, columns, strict=True)]
        return indices

    def simulate(self, seis, kept=None):
        """Record the gathers into seis (N, T, X), and the checkpoints that `gradient` needs into kept."""
        if kept is not None:
            self.check_memory()

        def work(lanes):
            p, p_old = self.fields(), self.fields()
            for lane in lanes:
                _fill(p, p_old)
                kept_here = (
                    None if kept is None else iter(kept.setdefault(lane.start, self.checkpoints(lane)))
                )
                for begin, end in [(0, self.n_samples)] if kept is None else self.blocks:
                    if kept is not None:
                        where, room = next(kept_here)
                        _view(room)[0], _view(room)[1] = _view(p_old)[where], _view(p)[where]
                    moving = {"p": p, "p_old": p_old, "drive": self.drive[lane], "gather": seis[lane]}
                    p, p_old = self.kernel(self, PLAIN, lane, begin, end, **moving)

        self.over_lanes(work)

    def checkpoints(self, lane):
        """For each block the index of its active cells, and room for fields (2, shots, rows, columns)."""
        n, indices = lane.stop - lane.start, self.active[lane.start]
        shapes = [
            (2, n, rows.stop - rows.start, columns.stop - columns.start) for _, rows, columns in indices
        ]
        rooms = self.empty(sum(map(math.prod, shapes))).split([math.prod(shape) for shape in shapes])
        return [(where, room.view(shape)) for where, room, shape in zip(indices, rooms, shapes, strict=True)]

    def gradient(self, d_seis, kept):
        """Gradients towards (alpha, v_min, drive), from the one towards seis (N, T, X) and checkpoints."""
        image = torch.zeros_like(self.alpha)[self.maps]
        sponge, d_drive = self.drive.new_zeros(self.n_shots), torch.empty_like(self.drive)

        def work(lanes):
            history, p, p_old = self.fields(BLOCK + 2), self.fields(), self.fields()
            for lane in lanes:
                _fill(p, p_old)
                for (begin, end), (where, room) in zip(
                    reversed(self.blocks), reversed(kept[lane.start]), strict=True
                ):
                    # cpu.cpp clears what it will read; the other kernels read cells that hold a later time
                    _fill(history[:, :2] if self.kernel is run_cpp else history)
                    for slot in range(2):
                        _view(history[:, slot])[where] = _view(room)[slot]
                    self.kernel(self, STORE, lane, begin, end, history=history, drive=self.drive[lane])
                    moving = {"p": p, "p_old": p_old, "drive": d_drive[lane], "gather": d_seis[lane]}
                    sums = {"image": image[lane], "sponge": sponge[lane]}
                    p, p_old = self.kernel(self, ADJOINT, lane, begin, end, history=history, **moving, **sums)

        self.over_lanes(work)
        # kernels use p[n] - p[n-1] - (1 - kappa) (p[n-1] - p[n-2]) as alpha lap p[n-1]: wrong at sources
        image[(self.shots, *self.source)] -= (d_drive * self.drive).sum(1) * self.alpha[
            (self.maps, *self.source)
        ]
        d_alpha = image[:, 1:, : self.nx].unflatten(0, self.shape[:2]).sum(1) / self.like**2
        return d_alpha, sponge.view(self.shape[:2]).sum(1) / self.v_min, d_drive.view(self.shape)

    def tangent(self, d_alpha, d_v_min, d_drive):
        """Change of the gathers (B, S, T, X) for given changes of (alpha, v_min, drive)."""
        seis = self.drive.new_empty(*self.drive.shape, self.nx - 2 * self.pad)
        image, sponge = self.layout(d_alpha / self.like)[self.maps], (d_v_min / self.v_min)[self.maps]
        d_drive = (
            d_drive.flatten(0, 1) - image[(self.shots, *self.source)][:, None] * self.drive
        )  # which the history contains

        def work(lanes):
            history, p, p_old = self.fields(BLOCK + 2), self.fields(), self.fields()
            for lane in lanes:
                _fill(p, p_old, history)
                for begin, end in self.blocks:
                    _view(history)[:, :2] = _view(history)[:, BLOCK:]
                    self.kernel(self, STORE, lane, begin, end, history=history, drive=self.drive[lane])
                    moving = {"p": p, "p_old": p_old, "drive": d_drive[lane], "gather": seis[lane]}
                    changes = {"image": image[lane], "sponge": sponge[lane]}
                    p, p_old = self.kernel(
                        self, TANGENT, lane, begin, end, history=history, **moving, **changes
                    )

        self.over_lanes(work)
        return seis.unflatten(0, self.shape[:2])

    def record_at_cells(self, rows, columns, every=1):
        """The field at given cells (C,) of the padded grid, every n-th time sample: (N, T', C)."""
        recorded = self.empty(self.n_shots, -(-self.n_samples // every), len(rows))

        def work(lanes):
            p, p_old = self.fields(), self.fields()
            gather = self.drive.new_empty(len(p), self.n_samples, self.nx - 2 * self.pad)
            for lane in lanes:
                _fill(p, p_old)
                moving = {"drive": self.drive[lane], "gather": gather}
                for k in range(recorded.shape[1]):
                    begin, end = max(0, (k - 1) * every + 1), k * every + 1
                    p, p_old = self.kernel(self, PLAIN, lane, begin, end, p=p, p_old=p_old, **moving)
                    _view(recorded)[lane, k] = _view(p)[:, rows + 1, columns]

        self.over_lanes(work)
        return recorded

    def check_memory(self):
        """Raise MemoryError if the checkpoints and buffers of a gradient do not fit into free memory."""
        n_lanes = min(torch.get_num_threads(), len(self.lanes))
        n_fields = self.n_shots + n_lanes * (BLOCK + 4) * self.lanes[0].stop
        n_cells = n_fields * (self.nz + 1) * self.stride
        for lane in self.lanes:
            for _, rows, columns in self.active[lane.start]:
                n_cells += (
                    2 * (lane.stop - lane.start) * (rows.stop - rows.start) * (columns.stop - columns.start)
                )
        need, free = n_cells * self.like.element_size(), _free_bytes(self.like.device)
        if need > free:
            raise MemoryError(
                f"gradient of {self.n_maps} maps: needs {need / 2**30:.2f} GiB, {free / 2**30:.2f} GiB free; "
                f"take {max(1, int(self.n_maps * free / need))} maps at a time, or fewer samples or sources"
            )


def _free_bytes(device):
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return math.inf
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), math.inf)


def _view(tensor):
    """The tensor, on a CPU as a NumPy array: PyTorch would start threads of its own within our threads."""
    return tensor.numpy() if tensor.device.type == "cpu" else tensor


def _fill(*tensors):
    for tensor in tensors:
        _view(tensor)[...] = 0


def _kernel(device_type):
    """The kernel to use, and how many shots are a lane; None means all of them."""
    if device_type == "cuda":
        try:
            from waves import cuda

            cuda.check_launcher()
            return cuda.run, None
        except ImportError as error:
            warn_once(f"waves: no Triton here ({error}); simulating in plain PyTorch, far slower")
    elif device_type == "cpu" and compiled() is not None:
        return run_cpp, 1
    return run_torch, None
