"""lmc keeps the KV cache of prompts a language model has already read, and gives it back when they
come again.
"""

__all__ = ["__version__"]

__version__ = "0.1.0"
