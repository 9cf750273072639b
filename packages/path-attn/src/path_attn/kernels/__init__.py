"""Triton kernels, imported when the `triton` back-end is asked for; not yet measured on a GPU."""
