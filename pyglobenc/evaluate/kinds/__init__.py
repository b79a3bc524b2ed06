"""The kinds of examples: texts, images, and the answers of language models."""
