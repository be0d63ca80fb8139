"""WHAT happened: the run directory, checkpoints that can be trusted, records."""
