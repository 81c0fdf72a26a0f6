"""Generate images in the order that the image itself asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anyorder.inference.pipeline import Pipeline, PipelineOutput

__version__ = "0.1.0"
__all__ = ["Pipeline", "PipelineOutput", "__version__"]


def __getattr__(name: str) -> Any:
    """Import the pipeline, and PyTorch with it, only when somebody asks for it."""
    if name in ("Pipeline", "PipelineOutput"):
        from anyorder.inference import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'anyorder' has no attribute '{name}'")
