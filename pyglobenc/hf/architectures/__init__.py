"""One small file for each architecture: it says which module of a layer plays which part."""
