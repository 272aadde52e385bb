"""Solvers of the reduced objective: one loop, and the path that leads a cold start into it."""
