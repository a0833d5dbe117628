"""Compare a checkpoint, as another engine runs it, with the eager reference."""
