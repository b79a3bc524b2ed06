"""Pictures of scores: HTML, PNG, terminal, and overlays of images."""
