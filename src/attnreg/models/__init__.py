"""What is fitted: maps from parameters to attention features, with their derivatives."""

from attnreg.models.base import Layout, Model, Parameters, Ridge
from attnreg.models.bilinear import Bilinear
from attnreg.models.features import Features
from attnreg.models.multihead import MultiHead
from attnreg.models.pooling import pool_kv_heads
from attnreg.models.rotary import Rotary

__all__ = [
    "Bilinear",
    "Features",
    "Layout",
    "Model",
    "MultiHead",
    "Parameters",
    "Ridge",
    "Rotary",
    "pool_kv_heads",
]
