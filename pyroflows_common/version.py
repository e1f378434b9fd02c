"""The version of all three packages, from which the build takes it."""

__version__ = "0.1.0"
