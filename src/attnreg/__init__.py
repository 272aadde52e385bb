"""attnreg."""
