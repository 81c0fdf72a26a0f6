"""Published pipelines by their names on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from anyorder.inference.convert import build, combine, read_tokenizer
from anyorder.inference.folders import Parts


class File(NamedTuple):
    """A file on the hub."""

    repo: str
    name: str


VQ16 = File("FoundationVision/LlamaGen", "vq_ds16_c2i.pt")
MASKGIT_VQ = File("fun-research/TiTok", "maskgit-vqgan-imagenet-f16-256.bin")

PUBLISHED: dict[File, tuple[File, tuple[int, int]]] = {
    File("ziqipang/RandAR", "randar_0.3b_llamagen_360k_bs_1024_lr_0.0004.safetensors"): (VQ16, (16, 16)),
    File("ziqipang/RandAR", "randar_0.3b_maskgit_360k_bs_1024_lr_0.0004.safetensors"): (MASKGIT_VQ, (16, 16)),
    File("ziqipang/RandAR", "randar_0.7b_llamagen_360k_bs_1024_lr_0.0004.safetensors"): (VQ16, (16, 16)),
    File("hp-l33/ARPG", "arpg_300m.pt"): (VQ16, (16, 16)),
    File("hp-l33/ARPG", "arpg_700m.pt"): (VQ16, (16, 16)),
    File("hp-l33/ARPG", "arpg_1b.pt"): (VQ16, (16, 16)),
    File("FoundationVision/LlamaGen", "c2i_B_256.pt"): (VQ16, (16, 16)),
    File("FoundationVision/LlamaGen", "c2i_L_256.pt"): (VQ16, (16, 16)),
    File("FoundationVision/LlamaGen", "c2i_B_384.pt"): (VQ16, (24, 24)),
    File("FoundationVision/LlamaGen", "c2i_L_384.pt"): (VQ16, (24, 24)),
    File("FoundationVision/LlamaGen", "c2i_XL_384.pt"): (VQ16, (24, 24)),
    File("FoundationVision/LlamaGen", "c2i_XXL_384.pt"): (VQ16, (24, 24)),
}
"""File of a model -> file of its tokenizer, rows and columns of patches."""


def find(hub_id: str) -> File | None:
    """The published file that an id names: REPO/FILE, or REPO for the first one of it.

    Raises:
        ValueError: a known repository without this file.
    """
    for file in PUBLISHED:
        if hub_id in (file.repo, f"{file.repo}/{file.name}"):
            return file
    siblings = [f"{file.repo}/{file.name}" for file in PUBLISHED if hub_id.startswith(f"{file.repo}/")]
    if siblings:
        raise ValueError(f"unknown model '{hub_id}': choose one of {', '.join(siblings)}")
    return None


def load_published(file: File) -> Parts:
    """Download a model and its tokenizer, unless they are in the hub's cache, and put them together.

    Raises:
        ValueError: a file that does not hold what it should.
    """
    from huggingface_hub import hf_hub_download

    tokenizer, grid = PUBLISHED[file]
    model = build(Path(hf_hub_download(file.repo, file.name)), grid=grid)
    return combine(model, read_tokenizer(Path(hf_hub_download(tokenizer.repo, tokenizer.name))))
