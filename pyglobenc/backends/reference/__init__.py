"""Plain PyTorch definitions of the ops, which every other backend is tested against."""
