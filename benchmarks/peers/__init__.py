"""The methods compared on the planted problem, one file per family."""

from benchmarks.peers.adam import Adam
from benchmarks.peers.base import Method, PlantedArrays, Status, Trace
from benchmarks.peers.lbfgs import LBFGS
from benchmarks.peers.levenberg_marquardt import LevenbergMarquardt
from benchmarks.peers.minimize import TorchMinimize
from benchmarks.peers.ours import Ours
from benchmarks.peers.scipy_trf import ScipyTRF

__all__ = ["MINIMA_PEERS", "OURS", "PEERS", "Method", "PlantedArrays", "Status", "Trace"]

OURS: Method = Ours()
PEERS: tuple[Method, ...] = (
    LBFGS(10),
    LBFGS(30),
    LBFGS(100),
    TorchMinimize("trust-ncg"),
    TorchMinimize("newton-cg"),
    LevenbergMarquardt("standard"),
    LevenbergMarquardt("adaptive"),
    ScipyTRF("lsmr", dense=False),
    ScipyTRF("lsmr", dense=True),
    ScipyTRF("lsmr", dense=True, scale="jac"),
    ScipyTRF("exact", dense=True),
    *(Adam(rate) for rate in (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)),
)

MINIMA_PEERS: tuple[Method, ...] = (  # one of each kind, where only the final loss matters
    LBFGS(30),
    TorchMinimize("trust-ncg"),
    TorchMinimize("newton-cg"),
    LevenbergMarquardt("adaptive"),
    ScipyTRF("lsmr", dense=True),
    Adam(1e-2),
)
