"""Learning: objectives as modules."""
