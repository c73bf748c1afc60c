"""Speed beside that of peers: `python -m experiments.benchmark`."""
