"""attnreg: the solver for attention regression.

Reading order: a :class:`AttentionProblem` is inputs and outputs of an attention layer; a model
(:class:`Bilinear`, the paper's ``X`` and ``Y``, or :class:`MultiHead`) says what is fitted;
:func:`fit` minimises the objective and returns a :class:`FitResult` with its :class:`Status`
and one :class:`IterationRecord` an iteration; :func:`fit_validated` fits as far as other sequences
say; :func:`verify` says in a :class:`Certificate` what is
proven of parameters, whoever found them. The mathematics is in ``objective``, ``models``
and ``curvature``; ``notation`` has the conventions. ``transformers`` applies all this to the models
of Hugging Face, and :func:`load` loads a converted one; both need the extra ``attnreg[hf]``.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from attnreg.certificate import Certificate, Kind, verify
from attnreg.early_stopping import fit_validated
from attnreg.fitting import fit
from attnreg.models import Bilinear, MultiHead, pool_kv_heads
from attnreg.problem import AttentionProblem
from attnreg.records import IterationRecord, Status
from attnreg.result import FitResult, predict

if TYPE_CHECKING:
    from torch import dtype as Dtype
    from torch import nn

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
    "fit_validated",
    "load",
    "pool_kv_heads",
    "predict",
    "verify",
]


def load(folder: str | os.PathLike[str], *, dtype: Dtype | None = None) -> nn.Module:
    """Loads a model folder, also one whose attention transformers' configurations cannot express.

    Args:
        folder: A folder that ``attnreg compress`` or ``save_pretrained`` has written, or the name
            of a model on the hub.
        dtype: The dtype of the weights in memory; None for that on disk.

    Returns:
        A model of transformers in evaluation mode, on the CPU.

    Raises:
        ValueError: If the folder is missing, damaged, or of a family that is not supported.
        ModuleNotFoundError: If transformers is not installed.
    """
    from attnreg.transformers.loading import load as load_folder

    return load_folder(folder, dtype=dtype)
