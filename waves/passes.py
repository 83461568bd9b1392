"""The kinds of passes through time, and the constants that all kernels share."""

import functools
import warnings

PLAIN, STORE, ADJOINT, TANGENT = range(4)  # kinds of passes; the same numbers as in cpu.cpp

BLOCK = 25  # time steps from one checkpoint to the next, which share a window of active cells

MARGIN = 8  # cells by which windows exceed the fastest ray, in float64 twice as many: errors < 1e-7 and 1e-12


@functools.cache
def warn_once(message):
    """Issue a warning, but only once in a process."""
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def newest_first(p, p_old, n_steps):
    """(p, p_old) after n_steps, each of which writes over p_old, so that the two change places."""
    return (p, p_old) if n_steps % 2 == 0 else (p_old, p)
