"""The parts of `fit`, each of use in a loop of one's own."""
