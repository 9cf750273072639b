"""The version of rlcr."""

__version__ = "0.1.0"
