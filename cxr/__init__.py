"""A chest X-ray lab for research and teaching. Not for diagnosis."""

__version__ = "0.1.0"
