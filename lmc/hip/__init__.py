"""AMD: device code of its own (device.h, pages.hip) and what launches go by. Calls of AMD's driver
stand in this folder alone.
"""

__all__ = ["WAVE"]

WAVE = 64
"""Threads that load together: the widest crew that a page is worth. Right on RDNA too, where it is
two waves.
"""
