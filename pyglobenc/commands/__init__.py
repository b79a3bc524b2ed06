"""Commands of the command line, one a module; none imports torch before it runs."""
