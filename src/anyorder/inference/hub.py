"""Published pipelines by their names on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from anyorder.contracts import require
from anyorder.families import File, published
from anyorder.inference.convert import build, combine, read_tokenizer
from anyorder.inference.folders import Parts


def models() -> list[File]:
    """The published files of any-order models."""
    return [file for family in published().values() for file in family.files if file.tokenizer]


def find(hub_id: str) -> File | None:
    """The published file that an id names: REPO/FILE, or REPO for the first one of it.

    Raises:
        ValueError: a known repository without this file.
    """
    for file in models():
        if hub_id in (file.repo, f"{file.repo}/{file.name}"):
            return file
    siblings = [f"{file.repo}/{file.name}" for file in models() if hub_id.startswith(f"{file.repo}/")]
    require(not siblings, f"unknown model '{hub_id}': choose one of {', '.join(siblings)}")
    return None


def load_published(file: File) -> Parts:
    """Download a model and its tokenizer, unless they are in the hub's cache, and put them together."""
    from huggingface_hub import hf_hub_download

    assert file.tokenizer is not None
    model = build(Path(hf_hub_download(file.repo, file.name)), grid=file.grid)
    tokenizer = read_tokenizer(Path(hf_hub_download(file.tokenizer.repo, file.tokenizer.name)))
    return combine(model, tokenizer)
