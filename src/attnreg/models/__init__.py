"""What is fitted: maps from parameters to attention features, with their derivatives."""

from attnreg.models.base import Layout, Model, Parameters, Ridge
from attnreg.models.bilinear import Bilinear
from attnreg.models.features import Features
from attnreg.models.multihead import MultiHead, pool_kv_heads

__all__ = [
    "Bilinear",
    "Features",
    "Layout",
    "Model",
    "MultiHead",
    "Parameters",
    "Ridge",
    "pool_kv_heads",
]
