"""How people write generative functions: `trace`, `gen`, `GenModule`."""
