"""Gradient estimators: distributions that say how a draw of them is differentiated."""
