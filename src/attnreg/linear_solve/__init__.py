"""Solvers of the damped Newton system."""
