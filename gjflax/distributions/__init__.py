"""Leaves: distributions as generative functions with one choice."""
