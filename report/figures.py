"""Figures of predictions and of their quality; without matplotlib one line says so."""

import numpy as np

from utils import V_MAX, V_MIN, write_atomic


def pyplot():
    """matplotlib's pyplot without a screen; None, said in one line, where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("no figures: matplotlib is not installed (pip install matplotlib)")
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def save_figure(fig, path):
    """Write a figure as .png, whole or not at all, and close it."""
    with write_atomic(path) as file:
        fig.savefig(file, format="png", dpi=80)
    pyplot().close(fig)


def draw_map(fig, ax, title, values, dx_m=10.0, cmap="viridis", vmin=V_MIN, vmax=V_MAX, unit="m/s"):
    """One map panel with axes in m and a bar; an empty one where there are no values."""
    if values is None:
        ax.axis("off")
        return
    extent = (0, dx_m * values.shape[1], dx_m * values.shape[0], 0)
    image = ax.imshow(values, extent=extent, cmap=cmap, vmin=vmin, vmax=vmax)
    ax.set(title=title, xlabel="x (m)", ylabel="depth (m)")
    fig.colorbar(image, ax=ax, label=unit)


def prediction_figure(path, rows, dx_m=10.0, dt_s=1e-3):
    """Draw gather, truth, prediction and error (prediction − truth), a row a sample, into `path`.

    rows: (title, seis (S, T, R), truth (Z, X) or None, prediction (Z, X)), m/s.
    """
    plt = pyplot()
    if plt is None:
        return
    fig, axes = plt.subplots(len(rows), 4, figsize=(13, 2.9 * len(rows)), squeeze=False, layout="constrained")
    for ax, (title, seis, truth, prediction) in zip(axes, rows, strict=True):
        gather = np.asarray(seis[len(seis) // 2], np.float32)
        low, high = np.percentile(gather, (5, 95))
        width_m = dx_m * gather.shape[1]
        ax[0].imshow(gather, cmap="gray", vmin=low, vmax=high, aspect="auto",
                     extent=(0, width_m, dt_s * len(gather), 0))  # fmt: skip
        ax[0].set(title=f"{title}: centre shot", xlabel="receiver (m)", ylabel="time (s)")
        draw_map(fig, ax[1], "truth", truth)
        draw_map(fig, ax[2], "prediction", prediction)
        if truth is not None:
            error = prediction - truth
            title = f"error, MAE {np.abs(error).mean():.0f} m/s"
            limit = max(float(np.abs(error).max()), 1.0)
            draw_map(fig, ax[3], title, error, cmap="RdBu_r", vmin=-limit, vmax=limit)
        else:
            ax[3].axis("off")
    save_figure(fig, path)


def draw_gather(ax, title, shot, limits, dx_m=10.0, dt_s=1e-3):
    extent = (0, dx_m * shot.shape[1], dt_s * len(shot), 0)
    ax.imshow(shot, cmap="gray", vmin=limits[0], vmax=limits[1], aspect="auto", extent=extent)
    ax.set(title=title, xlabel="receiver (m)", ylabel="time (s)")


def quality_figure(path, rows):
    """Gather, prediction, truth, error, simulated gather, residual; a row a sample, into `path`.

    rows: (title, seis (S, T, R), prediction (Z, X), truth (Z, X) or None, simulated (S, T, R)); centre shots,
    all on the observed one's scale.
    """
    plt = pyplot()
    if plt is None:
        return
    fig, axes = plt.subplots(len(rows), 6, figsize=(19, 2.9 * len(rows)), squeeze=False, layout="constrained")
    for ax, (title, seis, prediction, truth, other) in zip(axes, rows, strict=True):
        shot, simulated = (np.asarray(s[len(s) // 2], np.float32) for s in (seis, other))
        limits = np.percentile(shot, (5, 95))
        draw_gather(ax[0], title, shot, limits)
        draw_map(fig, ax[1], "prediction", prediction)
        draw_map(fig, ax[2], "truth", truth)
        if truth is None:
            ax[3].axis("off")
        else:
            error = prediction - truth
            limit = max(float(np.abs(error).max()), 1.0)
            heading = f"error, MAE {np.abs(error).mean():.1f} m/s"
            draw_map(fig, ax[3], heading, error, cmap="RdBu_r", vmin=-limit, vmax=limit)
        draw_gather(ax[4], "simulated from prediction", simulated, limits)
        draw_gather(ax[5], "residual", shot - simulated, limits)
    save_figure(fig, path)


def steps_figure(path, title, steps, truth, n_most=12):
    """Maps on the way of an inversion, [(what, (Z, X)), ...], at most `n_most`, and the truth or None."""
    plt = pyplot()
    if plt is None:
        return
    chosen = [steps[round(k)] for k in np.linspace(0, len(steps) - 1, min(n_most, len(steps)))]
    panels = [
        (what if truth is None else f"{what}\nMAE {np.abs(vel - truth).mean():.2f} m/s", vel)
        for what, vel in chosen
    ] + ([] if truth is None else [("truth", truth)])
    n_columns = min(5, len(panels))
    n_rows = -(-len(panels) // n_columns)
    size = (3.2 * n_columns, 2.8 * n_rows)
    fig, axes = plt.subplots(n_rows, n_columns, figsize=size, squeeze=False, layout="constrained")
    shades = [f(vel) for _, vel in panels[-2:] for f in (np.min, np.max)]
    for ax, (what, vel) in zip(axes.flat, panels, strict=False):
        draw_map(fig, ax, what, vel, vmin=min(shades), vmax=max(shades))
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    fig.suptitle(title)
    save_figure(fig, path)


def calibration_figure(path, misfits, errors, families, correlation):
    """Error against misfit, a colour a family, into `path`; drawn at 0.01 m/s and 1e-5 where less."""
    plt = pyplot()
    if plt is None:
        return
    misfits, errors = np.maximum(misfits, 1e-5), np.maximum(errors, 0.01)  # inverted maps may have none
    fig, ax = plt.subplots(figsize=(6, 4.5), layout="constrained")
    for name in sorted(set(families)):
        mine = [i for i, family in enumerate(families) if family == name]
        ax.loglog(misfits[mine], errors[mine], ".", label=name)
    ax.set(xlabel="misfit", ylabel="MAE (m/s)")
    ax.set_title(f"{len(misfits)} predictions, rank correlation {correlation:.2f}")
    ax.legend()
    save_figure(fig, path)
