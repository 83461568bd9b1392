"""The time loop on CPUs: cpu.cpp, compiled at its first use."""

import ctypes
import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from waves.passes import BLOCK, newest_first, warn_once


@functools.cache
def compiled():
    """cpu.cpp as a library, compiled for this machine in seconds; None, with a warning, where that fails."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), "c++")
    vectors = {"AVX512": ["-march=x86-64-v4", "-mprefer-vector-width=512"], "AVX2": ["-march=x86-64-v3"]}
    flags = ["-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp-simd", "-ffp-contract=fast"]
    reason = ""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows keeps a loaded library
        library, source = Path(folder, "cpu.so"), Path(__file__).with_name("cpu.cpp")
        # old compilers do not know x86-64-v3 and v4
        for target in (vectors.get(torch.backends.cpu.get_cpu_capability(), []), ["-march=native"]):
            command = [compiler, *flags, *target, source, "-o", library]
            try:
                subprocess.run(command, check=True, capture_output=True, text=True, errors="replace")
                return ctypes.CDLL(str(library))
            except (OSError, subprocess.CalledProcessError) as error:
                reason = reason or (getattr(error, "stderr", None) or str(error)).strip().splitlines()[0]
    warn_once(f"waves: no C++ compiler works here ({reason}); simulating in plain PyTorch, far slower")
    return None


class _Grid(ctypes.Structure):
    names = "nz nx stride pad source_row source receiver_row block"
    _fields_ = [(name, ctypes.c_long) for name in names.split()] + [("windows", ctypes.c_void_p)]


class _Shot(ctypes.Structure):
    names = "p p_old history alpha kappa_z kappa_x image drive gather sponge"
    _fields_ = [(name, ctypes.c_void_p) for name in names.split()]


def run_cpp(job, mode, lane, begin, end, **tensors):
    """Advance a lane of one shot through samples begin ... end - 1: the new (p, p_old), if any."""
    shot, map_index = lane.start, lane.start // job.n_sources
    size = (job.nz, job.nx, job.stride, job.pad)
    grid = _Grid(
        *size, job.source_row, job.sources[shot], job.receiver_row, BLOCK, job.windows[shot].ctypes.data
    )
    coefficients = {name: getattr(job, name)[map_index] for name in ("alpha", "kappa_z", "kappa_x")}
    pointers = _Shot(**{name: tensor.data_ptr() for name, tensor in (tensors | coefficients).items()})
    run = getattr(compiled(), {torch.float32: "wave_float32", torch.float64: "wave_float64"}[job.like.dtype])
    run(mode, ctypes.byref(grid), ctypes.byref(pointers), ctypes.c_long(begin), ctypes.c_long(end))
    return newest_first(tensors.get("p"), tensors.get("p_old"), end - begin)
