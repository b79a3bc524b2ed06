"""The web page of `pyglobenc demo`, made with Gradio."""

# The longest text, or pair of texts, and the largest image that are explained if nothing else is said.
MAX_CHARACTERS, MAX_PIXELS = 5_000, 1 << 24
