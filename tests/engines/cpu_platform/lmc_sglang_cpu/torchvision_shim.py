"""Declares two torchvision operators beside a CPU build of torch.

PyPI's torchvision is linked to CUDA; beside a CPU torch its operators never load and its import
fails. Nobody calls them here. With a CUDA or ROCm torch this does nothing: declaring an operator
twice aborts the process.
"""


def register() -> None:
    import torch

    if torch.version.cuda or torch.version.hip:
        return
    for op in ("nms", "qnms"):
        schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        torch.library.define(f"torchvision::{op}", schema)
