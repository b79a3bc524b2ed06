"""One small module an architecture: which module of a layer plays which part."""
