"""The time loop in plain PyTorch: on any device, slow."""

from waves.passes import ADJOINT, PLAIN, STORE, TANGENT, newest_first


def run_torch(
    job, mode, lane, begin, end, drive, p=None, p_old=None, history=None, gather=None, image=None, sponge=None
):
    """Like `cpu.run_cpp`, for all shots at once and on the full grid."""
    inside, columns = (..., slice(1, None), slice(job.nx)), slice(job.pad, job.nx - job.pad)
    maps, shots = job.maps[lane], job.shots[lane] - lane.start
    alpha, kappa = job.alpha[maps][inside], job.kappa_x[maps, None, : job.nx].repeat(1, job.nz, 1)
    kappa[..., columns] = job.kappa_z[maps, :, None]
    source, receivers = (shots, job.source_row, job.source[1][lane]), (slice(None), job.receiver_row, columns)
    here, before = (None, None) if mode == STORE else (p[inside], p_old[inside])
    for n in range(begin, end) if mode != ADJOINT else range(end - 1, begin - 1, -1):
        if mode != PLAIN:
            older, old, now = (history[:, n - begin + slot][inside] for slot in range(3))
        if mode == STORE:
            now.copy_(_next(old, older, alpha, kappa))
            now[source] += drive[:, n]
            continue
        if mode == ADJOINT:
            here[receivers] += alpha[receivers] * gather[:, n]
            drive[:, n] = here[source] / alpha[source]
            image[inside] += here * (now - old - (1 - kappa) * (old - older))
            sponge -= (here * (old - older) * kappa / alpha).sum((1, 2))
        before.copy_(_next(here, before, alpha, kappa))
        here, before = before, here
        if mode == TANGENT:
            here += image[inside] * (now - old - (1 - kappa) * (old - older))
            here -= sponge[:, None, None] * kappa * (old - older)
        if mode != ADJOINT:
            here[source] += drive[:, n]
            gather[:, n] = here[receivers]
    return newest_first(p, p_old, end - begin)


def _next(p, p_old, alpha, kappa):
    return p + ((1 - kappa) * (p - p_old) + alpha * _laplacian(p))


def _laplacian(p):
    """Fourth order, periodic. Adding differences to the centre rounds off less than subtracting 5 p."""
    near, far = (sum(p.roll(s, d) - p for d in (-2, -1) for s in (shift, -shift)) for shift in (1, 2))
    return 4 / 3 * near - 1 / 12 * far
