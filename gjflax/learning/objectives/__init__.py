"""Objectives: modules whose output is a loss to minimise."""
