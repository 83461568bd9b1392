"""Statistics of real and synthetic velocity maps, each with its sampling error."""

import numpy as np

LAGS = (1, 2, 4, 8, 16)
ROWS = (0, 5, 10, 20, 35, 50, 60, 69)
SLOW_M_S = 3000  # the limit between slow and fast velocities in faulted maps
MIN_CELLS = 8  # a velocity of fewer cells belongs to an edge, not to a layer
THICKNESS_BINS = (1, 4, 7, 8, 11, 16, 24, 70)


def layer_velocities(field):
    """Velocities that at least MIN_CELLS cells have, ascending; a map without layers may have none."""
    values, counts = np.unique(np.rint(field), return_counts=True)
    return values[counts >= MIN_CELLS]


def layers_of(field):
    """Numbers that describe a map's layers: {name: value}; (Z, X) m/s."""
    field = np.rint(field)
    values = layer_velocities(field)
    edge = np.diff(field, axis=0) != 0
    runs = []
    for column in edge[:, ::7].T:
        inner = np.flatnonzero(column)
        runs += np.diff(inner).tolist()  # without the first and last layer, which the border cuts
    runs = np.array(runs or [70])
    share = np.histogram(runs, THICKNESS_BINS)[0] / len(runs)
    names = [f"thickness {a}-{b - 1}" for a, b in zip(THICKNESS_BINS, THICKNESS_BINS[1:], strict=False)]
    steps = np.diff(field, axis=0)[edge]
    first = np.argmax(edge, 0)  # depth of each column's first interface
    slopes = np.diff(first)[np.diff(first) != 0]
    return {
        "velocities": float(len(values)),
        "slow share": float((values < SLOW_M_S).mean()) if len(values) else 0.0,
        "steps that rise": float((steps > 0).mean()) if len(steps) else 1.0,
        "interfaces a column": float(edge.sum(0).mean()),
        "vertical edges a row": float((np.diff(field, axis=1) != 0).sum(1).mean()),
        "interface dips": len(slopes) / (len(first) - 1),
        "fold height": float(np.ptp(first)),
        "fold turns": float((slopes[1:] * slopes[:-1] < 0).sum()),
        **dict(zip(names, share.tolist(), strict=True)),
    }


def texture_of(field):
    """Numbers that describe a map's velocities, gradients and spectrum: {name: value}; (Z, X) m/s."""
    down, across = np.abs(np.diff(field, axis=0)), np.abs(np.diff(field, axis=1))
    residual = field - field.mean(1, keepdims=True)
    power = np.abs(np.fft.fft2(residual)[:35, :35]) ** 2
    radius = np.hypot(*np.mgrid[:35, :35])
    bands = [power[(radius >= a) & (radius < b)].mean() for a, b in ((1, 3), (3, 6), (6, 12), (12, 24))]
    named = {f"row {z} mean": field[z].mean() for z in ROWS}
    named |= {f"gradient down {q}%": np.percentile(down, q) for q in (50, 90, 99)}
    named |= {f"gradient across {q}%": np.percentile(across, q) for q in (50, 90, 99)}
    named |= {"sharpest edge": max(down.max(), across.max()), "least": field.min(), "greatest": field.max()}
    names = ("1-3", "3-6", "6-12", "12-24")
    return named | {f"log power {name}": np.log10(band + 1) for name, band in zip(names, bands, strict=True)}


def correlations(maps):
    """Autocorrelation about the mean map, across and down: {name: one value a map}; (n, Z, X) m/s."""
    residual = maps - maps.mean(0)
    variance = (residual**2).mean((1, 2)) + 1e-9
    found = {"deviation": np.sqrt(variance)}
    for lag in LAGS:
        across = (residual[:, :, lag:] * residual[:, :, :-lag]).mean((1, 2))
        down = (residual[:, lag:] * residual[:, :-lag]).mean((1, 2))
        found |= {f"across, lag {lag}": across / variance, f"down, lag {lag}": down / variance}
    return found


def statistics(maps):
    """{name: one value a map} of maps (n, 1, Z, X) m/s."""
    fields = maps[:, 0].astype(np.float64)
    rows = [layers_of(field) | texture_of(field) for field in fields]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]} | correlations(fields)


def print_statistics(real, made):
    """Print each statistic: mean ± standard error of both kinds, and their distance in standard errors."""
    print(f"  {'':24}{'real':>20}{'synthetic':>20}{'errors apart':>14}")
    ours = statistics(made)
    for name, values in statistics(real).items():
        means = values.mean(), ours[name].mean()
        errors = [v.std() / np.sqrt(len(v)) for v in (values, ours[name])]
        apart = (means[1] - means[0]) / max(np.hypot(*errors), 1e-9)
        cells = "".join(f"{f'{m:.4g} ± {e:.2g}':>20}" for m, e in zip(means, errors, strict=True))
        print(f"  {name:24}{cells}{apart if abs(means[1] - means[0]) > 1e-9 else 0:>14.1f}")
