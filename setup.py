"""Build script; everything declarative is in pyproject.toml. Never imports torch."""

from setuptools import setup

setup()
