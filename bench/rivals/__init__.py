"""Rivals: other code for the same problem, at its best settings."""
