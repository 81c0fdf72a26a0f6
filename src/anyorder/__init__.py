"""Generate images in the order that the image itself asks for."""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anyorder.inference.output import PipelineOutput
    from anyorder.inference.pipeline import Pipeline
    from anyorder.method.policy_config import PolicyConfig
    from anyorder.method.sampling import Sampling

__version__ = "0.1.0"
__all__ = ["Pipeline", "PipelineOutput", "PolicyConfig", "Sampling", "__version__"]

# OpenMP threads wait for one another by spinning, by default for milliseconds: beside other busy processes
# they keep the very thread that they wait for off the processor. Read once, when PyTorch loads libgomp.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # 1000 loses up to 20 % alone, 5000 more when busy


def __getattr__(name: str) -> Any:
    """Import the pipeline, and PyTorch with it, only when somebody asks for it."""
    homes = {
        "Pipeline": "inference.pipeline",
        "PipelineOutput": "inference.output",
        "PolicyConfig": "method.policy_config",
        "Sampling": "method.sampling",
    }
    if name in homes:
        return getattr(importlib.import_module(f"anyorder.{homes[name]}"), name)
    raise AttributeError(f"module 'anyorder' has no attribute '{name}'")
