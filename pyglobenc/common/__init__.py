"""Small helpers that every room may import."""
