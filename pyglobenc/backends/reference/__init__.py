"""Plain PyTorch definitions of the ops: the truth that every backend is tested against."""
