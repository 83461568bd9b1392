"""What a pass through time does, and the constants that all kernels share."""

import functools
import warnings

PLAIN, STORE, ADJOINT, TANGENT = range(4)  # what a pass through time does; the same numbers as in cpu.cpp

BLOCK = 25  # time steps from one checkpoint to the next, and for which a window of active cells holds

MARGIN = 8  # cells by which windows exceed the fastest ray, twice that in float64: errors < 1e-7 and 1e-12


@functools.cache
def warn_once(message):
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def newest_first(p, p_old, n_steps):
    """Every step writes over p_old, so that the two change places."""
    return (p, p_old) if n_steps % 2 == 0 else (p_old, p)
