"""The wave equation behind OpenFWI, exact, fast and differentiable: `from waves import simulate`."""

from waves.equation import OPENFWI, SOURCES, Acquisition, jacobian, ricker, simulate

__all__ = ["OPENFWI", "SOURCES", "Acquisition", "jacobian", "ricker", "simulate"]
