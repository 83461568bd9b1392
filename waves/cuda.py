"""The time loop of engine.py on CUDA: one Triton launch per time step for all shots of a batch.

engine.py imports it only where needed, since Triton comes with CUDA builds of PyTorch alone. The
arithmetic, the fields' layout and the modes are those of cpu.cpp; here wrapped indices reach the other side
of the grid.
"""

import contextlib

import torch
import triton
import triton.language as tl

from waves.passes import ADJOINT, BLOCK, MARGIN, PLAIN, STORE, TANGENT

TILE_Z, TILE_X = 8, 64  # cells per program
_PLAIN, _ADJOINT, _TANGENT = map(tl.constexpr, (PLAIN, ADJOINT, TANGENT))  # as kernels take constants


@triton.jit
def _distance(x, first, last, n):
    """Cells from x to the nearest of first ... last on a ring of n cells, as a float."""
    direct, around = tl.maximum(first - x, x - last), tl.minimum(x + n - last, first + n - x)
    return tl.maximum(tl.minimum(direct, around), 0).to(tl.float32)


@triton.jit
def _ring(p, c, z, x, i: tl.constexpr, active, nz, nx, stride):
    """The four cells i + 1 rows or columns away, each minus the cell `c` itself, added up."""
    row = (z + 1) * stride
    up = tl.where(z > i, z - i, z - i + nz) * stride
    down = tl.where(z + i + 1 < nz, z + i + 2, z + i + 2 - nz) * stride
    west = tl.where(x > i, x - i - 1, x - i - 1 + nx)
    east = tl.where(x + i + 1 < nx, x + i + 1, x + i + 1 - nx)
    vertical = (tl.load(p + up + x, active, 0) - c) + (tl.load(p + down + x, active, 0) - c)
    horizontal = (tl.load(p + row + west, active, 0) - c) + (tl.load(p + row + east, active, 0) - c)
    return vertical + horizontal


@triton.jit(do_not_specialize=["n", "top", "left"])
def _step(
    p,  # at n - 1 (ADJOINT: n)
    p_old,  # one step before (ADJOINT: after)
    out,  # at n (ADJOINT: n - 1); p_old itself but in STORE
    shot_stride,  # cells from one shot to the next in p, p_old, out
    past,  # the history at n - 2
    past_stride,
    alpha,
    kappa_z,
    kappa_x,
    image,
    sponge,
    sums,  # (shots, programs) ADJOINT: what to subtract from sponge
    drive,
    gather,
    source,  # (shots) column of the injection
    reach,  # (shots) cells per time step of the fastest ray
    n,
    n_samples,
    n_sources,
    nz,
    nx,
    stride,
    pad,
    source_row,
    receiver_row,
    first_receiver,
    last_receiver,
    top,
    left,
    MODE: tl.constexpr,
    BLOCK: tl.constexpr,
    MARGIN: tl.constexpr,
    TILE_Z: tl.constexpr,
    TILE_X: tl.constexpr,
):
    shot = tl.program_id(2).to(tl.int64)
    z = top + tl.program_id(1) * TILE_Z + tl.arange(0, TILE_Z)[:, None]
    x = left + tl.program_id(0) * TILE_X + tl.arange(0, TILE_X)[None, :]
    source_x, cells, begin = tl.load(source + shot), tl.load(reach + shot), n // BLOCK * BLOCK
    there = cells * (begin + BLOCK) + MARGIN
    back = cells * (n_samples - begin) + MARGIN
    dz, dx = _distance(z, source_row, source_row, nz), _distance(x, source_x, source_x, nx)
    active = (z < nz) & (x < nx) & (dz * dz + dx * dx <= there * there)
    dz, dx = _distance(z, receiver_row, receiver_row, nz), _distance(x, first_receiver, last_receiver, nx)
    active = active & (dz * dz + dx * dx <= back * back)
    if tl.sum(active.to(tl.int32)) == 0:
        return
    map_index = shot // n_sources
    field = (nz + 1) * stride
    here = (z + 1) * stride + x
    p += shot * shot_stride
    c = tl.load(p + here, active, 0)
    near = _ring(p, c, z, x, 0, active, nz, nx, stride)
    laplacian = (16 * near - _ring(p, c, z, x, 1, active, nz, nx, stride)) / 12
    inside = (x >= pad) & (x < nx - pad)
    damping_x = tl.load(kappa_x + map_index * stride + x, x < nx, 0)
    kappa = tl.where(inside, tl.load(kappa_z + map_index * nz + z, z < nz, 0), damping_x)
    a = tl.load(alpha + map_index * field + here, active, 1)
    old = tl.load(p_old + shot * shot_stride + here, active, 0)
    result = c + ((1 - kappa) * (c - old) + a * laplacian)
    at_source = active & (z == source_row) & (x == source_x)
    at_receiver = active & (z == receiver_row) & inside
    sample = shot * n_samples + n
    if MODE == _ADJOINT or MODE == _TANGENT:
        past += shot * past_stride + here
        oldest, older = tl.load(past, active, 0), tl.load(past + field, active, 0)
        diff = older - oldest
        alpha_lap = tl.load(past + 2 * field, active, 0) - older - (1 - kappa) * diff
        image += shot * field + here
        if MODE == _ADJOINT:
            tl.store(image, tl.load(image, active, 0) + c * alpha_lap, active)
            program = (shot * tl.num_programs(1) + tl.program_id(1)) * tl.num_programs(0) + tl.program_id(0)
            tl.store(sums + program, tl.load(sums + program) + tl.sum(c * diff * kappa / a))
            tl.store(drive + sample + tl.zeros_like(here), c / a, at_source)
            previous = tl.maximum(sample - 1, 0) * (nx - 2 * pad)  # the value for n = 0 is not used
            result += a * tl.load(gather + previous + x - pad + tl.zeros_like(here), at_receiver, 0)
        else:
            result += tl.load(image, active, 0) * alpha_lap - tl.load(sponge + shot) * kappa * diff
    if MODE != _ADJOINT:
        result += tl.where(at_source, tl.load(drive + sample), 0)
    if MODE == _PLAIN or MODE == _TANGENT:
        tl.store(gather + sample * (nx - 2 * pad) + x - pad + tl.zeros_like(here), result, at_receiver)
    tl.store(out + shot * shot_stride + here, result, active)


def on_card(tensor):
    """A context in which the tensor's card is the current one, on which Triton launches."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def check_launcher():
    """Build what Triton launches kernels with; raises ImportError, one line, where that fails.

    It needs a C compiler, Python's headers and a driver that is new enough: Triton itself is asked, since it
    looks for them in places of its own.
    """
    try:
        target = triton.runtime.driver.active.get_current_target()
    except Exception as error:  # errors of the compiler, the driver and Triton have no common class
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ImportError(f"its launcher cannot be built: {reason}") from None
    if target.backend == "cuda" and target.arch < 70:  # such as P100
        raise ImportError(f"it compiles for compute capability 7.0 on, this card has {target.arch / 10}")


def run(
    job, mode, lane, begin, end, drive, p=None, p_old=None, history=None, gather=None, image=None, sponge=None
):
    """Like `cpu.run_cpp`, for all shots at once."""
    field, receivers = (
        (job.nz + 1) * job.stride,
        (slice(None), job.receiver_row + 1, slice(job.pad, job.nx - job.pad)),
    )
    if mode in (PLAIN, TANGENT):
        gather[:, begin:end] = 0  # for receivers that no energy has reached
    if mode == ADJOINT:
        drive[:, begin:end] = 0
        if end == job.n_samples:  # every other sample is injected by the step before
            p[receivers] += job.alpha[job.maps][receivers] * gather[:, end - 1]
    survey = (job.source[1], job.reach), (job.n_samples, job.n_sources, job.nz, job.nx, job.stride, job.pad)
    rows = job.source_row, job.receiver_row, *job.receivers
    constants = {
        "BLOCK": BLOCK,
        "MARGIN": MARGIN * drive.element_size() // 4,
        "TILE_Z": TILE_Z,
        "TILE_X": TILE_X,
    }
    history_stride, sums, block = 0 if history is None else history.stride(0), None, None
    for n in range(begin, end) if mode != ADJOINT else range(end - 1, begin - 1, -1):
        if n // BLOCK != block:
            block = n // BLOCK
            _, across, along = job.active[lane.start][block]
            tiles = (
                triton.cdiv(along.stop - along.start, TILE_X),
                triton.cdiv(across.stop - 1 - across.start, TILE_Z),
            )
            sums = drive.new_zeros(len(drive), tiles[0] * tiles[1]) if mode == ADJOINT else None
        past = None if history is None else history[:, n - begin]
        fields = p, p_old, p_old, field
        if mode == STORE:
            fields = history[:, n - begin + 1], past, history[:, n - begin + 2], history_stride
        medium = job.alpha, job.kappa_z, job.kappa_x, image, sponge, sums, drive, gather
        corner = across.start, along.start
        numbers = *survey[0], n, *survey[1], *rows, *corner
        if 0 not in tiles:
            with on_card(drive):
                _step[(*tiles, len(drive))](
                    *fields, past, history_stride, *medium, *numbers, MODE=mode, **constants
                )
        p, p_old = p_old, p
        if mode == ADJOINT and (n == begin or (n - 1) // BLOCK != block):
            sponge -= sums.sum(1)
    return p, p_old
