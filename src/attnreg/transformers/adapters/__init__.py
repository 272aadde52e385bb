"""The families of models that are supported, one file each."""

from attnreg.transformers.adapters import albert, bert, gpt2, llama  # each registers its family
from attnreg.transformers.adapters.base import Adapter, NotExpressible, adapter_for, register

__all__ = [
    "Adapter",
    "NotExpressible",
    "adapter_for",
    "albert",
    "bert",
    "gpt2",
    "llama",
    "register",
]
