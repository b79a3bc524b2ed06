"""GlobEnc and the other methods that roll out norms or attention."""
