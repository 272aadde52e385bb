"""How fast each kernel runs beside plain matrix products: counts, replay, measurement, picture."""

from attnreg.roofline.kernels import Sizes
from attnreg.roofline.measure import Roofline, measure
from attnreg.roofline.precision import PRECISIONS

__all__ = ["PRECISIONS", "Roofline", "Sizes", "measure"]
