"""4-bit integers of a checkpoint: as it stores them, and as a packed file does."""
