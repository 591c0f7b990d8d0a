"""Guides: variational families, built from a model or made of a network."""
