"""The version of wavelength-rsa."""

__version__ = "0.1.0"
