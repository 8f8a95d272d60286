"""lmc in vLLM. `LLM(..., kv_offloading_backend="lmc", kv_offloading_size=10)` and
`vllm serve --kv-offloading-backend lmc` need nothing but the installed package; where vLLM loads no
plugins, `import lmc_vllm` at the top of the launch script teaches the same.
"""

from lmc_vllm.switch import register

register()
