"""The generative function interface and the data that it speaks in."""
