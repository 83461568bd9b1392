"""The wave equation of OpenFWI, exact, fast and differentiable: `from waves import simulate`."""

from waves.acquisition import OPENFWI, SOURCES, Acquisition, ricker
from waves.equation import jacobian, simulate

__all__ = ["OPENFWI", "SOURCES", "Acquisition", "jacobian", "ricker", "simulate"]
