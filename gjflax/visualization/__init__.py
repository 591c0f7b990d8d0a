"""Models for people: their graph, as text and as a picture, and a table of their parameters and choices."""
