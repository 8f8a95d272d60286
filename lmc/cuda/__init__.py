"""NVIDIA: device code of its own (device.h, pages.cu) and what launches go by. Calls of NVIDIA's
driver stand in this folder alone.
"""

__all__ = ["WAVE"]

WAVE = 32
"""Threads that load together: the widest crew that a page is worth."""
