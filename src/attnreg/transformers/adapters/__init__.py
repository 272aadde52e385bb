"""The families of models that are supported, one file each."""

from attnreg.transformers.adapters import bert, llama  # each registers its family
from attnreg.transformers.adapters.base import Adapter, NotExpressible, adapter_for, register

__all__ = ["Adapter", "NotExpressible", "adapter_for", "bert", "llama", "register"]
