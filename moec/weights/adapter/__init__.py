"""LoRA adapters, which are added to the weights of a checkpoint while these are read."""
