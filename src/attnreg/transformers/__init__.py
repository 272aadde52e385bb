"""Real models: capture, fit, convert, evaluate, load. Needs the extra ``attnreg[hf]``."""

from importlib.util import find_spec

if find_spec("transformers") is None:
    raise ModuleNotFoundError(
        "attnreg.transformers needs the package transformers: pip install 'attnreg[hf]'",
        name="transformers",
    )
