"""Gives SGLang's radix cache a memory: chunks in RAM, on disk and beyond.

`import lmc_sglang` at the top of a launch script switches it on; so does LMC_ENABLE=1 in the
environment of `python -m sglang.launch_server`. Explicitly, by SGLang's own flags: linker
`LmcLinker` of module `lmc_sglang.linker`.
"""

from .switch import switch_on

__all__ = ["switch_on"]

switch_on()
