"""Captures one forward pass: records tensors of every layer, and checks them."""
