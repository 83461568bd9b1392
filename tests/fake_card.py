"""Run a file or module of Python on the stand-in for CUDA cards, as `python` would: see test_cards.py.

Its kernels are the CPU's. Two things that need a real card are replaced here: NCCL by gloo, and the wave
equation's kernel by the CPU's.
"""

import os
import runpy
import sys
import warnings

import fakecuda
import torch
import torch.distributed as dist

from waves import engine
from waves.cpu import run_cpp
from waves.passes import newest_first

torch.set_num_threads(1)


def all_shots(job, mode, lane, begin, end, **tensors):
    """As waves.cuda.run, by the CPU's kernel, which takes shot after shot."""
    for i in range(lane.stop - lane.start):
        shot = slice(lane.start + i, lane.start + i + 1)
        run_cpp(job, mode, shot, begin, end, **{name: tensor[i : i + 1] for name, tensor in tensors.items()})
    return newest_first(tensors.get("p"), tensors.get("p_old"), end - begin)


def note(kind):
    """What waits for the card raises or warns as set_sync_debug_mode says, like on a real one."""
    waits = kind.startswith("sync")
    if "copy" in kind:
        call = sys._getframe(1).f_locals  # of the copy: (to, from, non_blocking=False)
        waits = not call["kwargs"].get("non_blocking", call["args"][2:] and call["args"][2])
    message, mode = f"called a synchronizing CUDA operation: {kind}", torch.cuda.get_sync_debug_mode()
    if waits and mode == 2:
        raise RuntimeError(message)
    if waits and mode == 1:
        warnings.warn(message, stacklevel=2)


def without_float64(tensor):
    """Refuse what Apple's MPS refuses."""
    if tensor.is_cuda and tensor.dtype == torch.float64:
        raise TypeError("float64 on the card")
    return real_alias(tensor)


def reflection_backward(*args):
    """As on a card: torch has no deterministic one."""
    if torch.are_deterministic_algorithms_enabled():
        raise RuntimeError("reflection_pad2d_backward_cuda does not have a deterministic implementation")
    return real_reflection_backward(*args)


real_reflection_backward = fakecuda.make(
    torch.ops.aten.reflection_pad2d_backward.default, "reflection_pad2d_backward"
)
LIBRARY = torch.library.Library("aten", "IMPL")
LIBRARY.impl("reflection_pad2d_backward", reflection_backward, "CUDA", allow_override=True)
real_kernel, real_group, real_alias = engine._kernel, dist.init_process_group, fakecuda.alias
engine._kernel = lambda device: (all_shots, None) if device == "cuda" else real_kernel(device)
dist.init_process_group = lambda backend, **options: real_group("gloo", **options)
fakecuda.note = note
if "WITHOUT_FLOAT64" in os.environ:
    fakecuda.alias = without_float64

if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    if sys.argv[0] == "-m":
        sys.argv = sys.argv[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")
