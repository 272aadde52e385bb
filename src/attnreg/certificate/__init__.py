"""Certificates: what can be proven of parameters without trusting who found them."""

from attnreg.certificate.certificate import Certificate, Kind
from attnreg.certificate.verify import verify

__all__ = ["Certificate", "Kind", "verify"]
