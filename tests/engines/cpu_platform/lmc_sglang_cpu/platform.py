"""The platform: layers take their plain torch path, attention is SGLang's `torch_native`."""

from __future__ import annotations

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform


class NativeCpuPlatform(CpuDeviceMixin, SRTPlatform):
    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"
    capabilities = PlatformCapabilities()

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_dispatch_key_name(self) -> str:
        return "native"

    def init_backend(self) -> None:
        from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

        from .attention import extend, in_windows
        from .pinning import do_without

        do_without()
        backend = TorchNativeAttnBackend
        backend._run_sdpa_forward_extend = in_windows(extend)
        backend._run_sdpa_forward_decode = in_windows(backend._run_sdpa_forward_decode)

    def post_load_model(self, model: object) -> None:
        """MLA models take the absorbed (latent) path: torch_native reads no latent KV as MHA."""
        from sglang.srt.models.deepseek_common.attention_backend_handler import (
            AttentionBackendRegistry,
        )
        from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import (
            AttnForwardMethod,
        )

        AttentionBackendRegistry.register("torch_native", lambda attn, batch: AttnForwardMethod.MLA)
