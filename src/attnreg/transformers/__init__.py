"""Real models: capture, fit, convert, evaluate, load. Needs the extra ``attnreg[hf]``."""
