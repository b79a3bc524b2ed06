"""Drop-in modules for scripts written on the published code: the same names, arguments and results, on stock transformers models."""
