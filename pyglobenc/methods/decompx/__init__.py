"""DecompX: decomposed token representations, from the input tokens up to a logit."""
