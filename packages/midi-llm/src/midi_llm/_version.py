"""The version of midi-llm."""

__version__ = "0.1.0"
