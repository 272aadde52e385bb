"""attnreg: the solver for attention regression.

Reading order: a :class:`AttentionProblem` is inputs and outputs of an attention layer; a model
(:class:`Bilinear`, the paper's ``X`` and ``Y``, or :class:`MultiHead`) says what is fitted;
:func:`fit` minimises the objective and returns a :class:`FitResult` with its :class:`Status`
and one :class:`IterationRecord` an iteration; :func:`verify` says in a :class:`Certificate` what is
proven of parameters, whoever found them. The mathematics is in ``objective``, ``models``
and ``curvature``; ``notation`` has the conventions.
"""

from attnreg.certificate import Certificate, Kind, verify
from attnreg.fitting import fit
from attnreg.models import Bilinear, MultiHead, pool_kv_heads
from attnreg.problem import AttentionProblem
from attnreg.records import IterationRecord, Status
from attnreg.result import FitResult, predict

__version__ = "0.1.0"

__all__ = [
    "AttentionProblem",
    "Bilinear",
    "Certificate",
    "FitResult",
    "IterationRecord",
    "Kind",
    "MultiHead",
    "Status",
    "fit",
    "pool_kv_heads",
    "predict",
    "verify",
]
