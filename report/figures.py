"""Figures of predictions and of their quality. Without matplotlib one line says that there are none."""

import os
from importlib.util import find_spec

import numpy as np

from options.outputs import check_replaces
from system.files import write_atomic
from utils import V_MAX, V_MIN


def new_figure(size, layout="constrained"):
    """An empty figure of (width, height) inches, or None, with a message, if matplotlib is not installed.

    It is made without pyplot, which would choose a backend for the whole process.
    """
    backend = os.environ.get("MPLBACKEND", "").removeprefix("module://").partition(".")[0]
    if "://" in os.environ.get("MPLBACKEND", "") and find_spec(backend) is None:
        os.environ["MPLBACKEND"] = "agg"  # inherited from a notebook whose backend is not installed here
    try:
        import matplotlib.figure
    except ImportError:
        print("no figures: matplotlib is not installed (pip install matplotlib)")
        return None
    return matplotlib.figure.Figure(figsize=size, layout=layout)


def save_figure(fig, path, dpi=80):
    """Write a figure as .png, complete or not at all; ValueError if another kind of file is there."""
    check_replaces(path, "picture")
    with write_atomic(path) as file:
        fig.savefig(file, format="png", dpi=dpi)


def draw_map(fig, ax, title, values, dx_m=10.0, cmap="viridis", vmin=V_MIN, vmax=V_MAX, unit="m/s"):
    """Draw a map (Z, X) with axes in m and a colour bar; an empty panel if `values` is None."""
    if values is None:
        ax.axis("off")
        return
    extent = (0, dx_m * values.shape[1], dx_m * values.shape[0], 0)
    image = ax.imshow(values, extent=extent, cmap=cmap, vmin=vmin, vmax=vmax)
    ax.set(title=title, xlabel="x (m)", ylabel="depth (m)")
    fig.colorbar(image, ax=ax, label=unit)


def draw_gather(ax, title, shot, limits, dx_m=10.0, dt_s=1e-3):
    """Draw a shot (T, R) in grey between two amplitudes, time downwards in s, receivers in m."""
    extent = (0, dx_m * shot.shape[1], dt_s * len(shot), 0)
    ax.imshow(shot, cmap="gray", vmin=limits[0], vmax=limits[1], aspect="auto", extent=extent)
    ax.set(title=title, xlabel="receiver (m)", ylabel="time (s)")


def draw_error(fig, ax, prediction, truth):
    """Draw prediction − truth on a scale symmetric about zero; an empty panel if truth is None."""
    if truth is None:
        ax.axis("off")
        return
    error = prediction - truth
    limit = max(float(np.abs(error).max()), 1.0)
    heading = f"error, MAE {np.abs(error).mean():.1f} m/s"
    draw_map(fig, ax, heading, error, cmap="RdBu_r", vmin=-limit, vmax=limit)


def prediction_figure(path, rows):
    """Draw the centre shot, truth, prediction and error of some samples, one in each row, into `path`.

    rows: (title, seis (S, T, R), truth (Z, X) m/s or None, prediction (Z, X) m/s) each, optionally with the
    gather (S, T, R) simulated from the prediction: then it and the residual are drawn too, on the same scale.
    """
    n_columns = 6 if any(len(row) > 4 for row in rows) else 4
    if not (fig := new_figure((3.2 * n_columns, 2.9 * len(rows)))):
        return
    axes = fig.subplots(len(rows), n_columns, squeeze=False)
    for ax, (title, seis, truth, prediction, *simulated) in zip(axes, rows, strict=True):
        centre = len(seis) // 2
        shot = np.asarray(seis[centre], np.float32)
        limits = np.percentile(shot, (5, 95))
        draw_gather(ax[0], f"{title}: centre shot", shot, limits)
        draw_map(fig, ax[1], "truth", truth)
        draw_map(fig, ax[2], "prediction", prediction)
        draw_error(fig, ax[3], prediction, truth)
        for other in simulated:
            other = np.asarray(other[centre], np.float32)
            draw_gather(ax[4], "simulated from prediction", other, limits)
            draw_gather(ax[5], "residual", shot - other, limits)
    save_figure(fig, path)


def steps_figure(path, title, steps, truth, n_most=12):
    """Draw the maps on an inversion's way, [(what, (Z, X)), ...], `n_most` at most, and the truth or None."""
    chosen = [steps[round(k)] for k in np.linspace(0, len(steps) - 1, min(n_most, len(steps)))]
    panels = [
        (what if truth is None else f"{what}\nMAE {np.abs(vel - truth).mean():.2f} m/s", vel)
        for what, vel in chosen
    ] + ([] if truth is None else [("truth", truth)])
    n_columns = min(5, len(panels))
    n_rows = -(-len(panels) // n_columns)
    if not (fig := new_figure((3.2 * n_columns, 2.8 * n_rows))):
        return
    axes = fig.subplots(n_rows, n_columns, squeeze=False)
    shades = [f(vel) for _, vel in panels[-2:] for f in (np.min, np.max)]
    for ax, (what, vel) in zip(axes.flat, panels, strict=False):
        draw_map(fig, ax, what, vel, vmin=min(shades), vmax=max(shades))
    for ax in axes.flat[len(panels) :]:
        ax.axis("off")
    fig.suptitle(title)
    save_figure(fig, path)


def calibration_figure(path, misfits, errors, families, correlation):
    """Plot errors (m/s) against misfits, a colour for each family, into `path`."""
    if not (fig := new_figure((6, 4.5))):
        return
    misfits, errors = (
        np.maximum(misfits, 1e-5),
        np.maximum(errors, 0.01),
    )  # inversion may reach zero, which a logarithm cannot show
    ax = fig.subplots()
    for name in sorted(set(families)):
        mine = [i for i, family in enumerate(families) if family == name]
        ax.loglog(misfits[mine], errors[mine], ".", label=name)
    ax.set(xlabel="misfit", ylabel="MAE (m/s)")
    ax.set_title(f"{len(misfits)} predictions, rank correlation {correlation:.2f}")
    ax.legend()
    save_figure(fig, path)
