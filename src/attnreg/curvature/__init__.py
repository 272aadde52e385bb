"""Curvature of the reduced objective: Kronecker estimates and dense assembly."""
