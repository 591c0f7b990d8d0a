"""Generative functions made of generative functions, one file each."""
