"""One small file for each architecture: it says which module of a layer plays which part.

To add a model, add a file here; docs/add_an_architecture.md gives the steps.
"""
