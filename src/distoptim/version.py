"""The library's version; a test holds the other distribution and CITATION.cff to it."""

__version__ = "0.1.0"
