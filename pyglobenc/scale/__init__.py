"""Long sequences, large corpora and memory."""
