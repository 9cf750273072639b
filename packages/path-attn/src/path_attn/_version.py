"""The version of path-attn."""

__version__ = "0.1.0"
