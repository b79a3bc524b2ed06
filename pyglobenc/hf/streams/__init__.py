"""Models of two streams of tokens: encoder-decoders, and an image beside a text."""
