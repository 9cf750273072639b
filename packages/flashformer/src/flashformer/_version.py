"""The version of flashformer."""

__version__ = "0.1.0"
