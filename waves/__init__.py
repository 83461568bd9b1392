"""The wave equation of OpenFWI, exact, fast and differentiable: `from waves import simulate`."""

from waves.acquisition import OPENFWI, SOURCES, Acquisition, ricker
from waves.derivatives import jacobian, map_jacobian
from waves.equation import simulate

__all__ = ["OPENFWI", "SOURCES", "Acquisition", "jacobian", "map_jacobian", "ricker", "simulate"]
