"""Are the adapters equal to the original programs? The same random weights, through both.

    python experiments/compare_adapters.py --llamagen DIR --randar DIR --arpg DIR [--large]

DIR are checkouts of FoundationVision/LlamaGen, ziqipang/RandAR and hp-l33/ARPG, which are run as they are.
Weights go through a file of the published kind and `anyorder.runs.convert`. Everything is float32 on the CPU.
The GPTs are tiny, or with --large of size L, for which only teacher forcing of one image is compared.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import importlib.util
import math
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from anyorder.contracts import AnyOrderModel, Grid
from anyorder.inference.convert import build
from anyorder.method.guidance import GuidanceConfig, Guided
from anyorder.orders import random_orders

NO_DROPOUT = {"token_dropout_p": 0.0, "attn_dropout_p": 0.0, "resid_dropout_p": 0.0, "ffn_dropout_p": 0.0}


class Size(NamedTuple):
    """Of the models and the batch."""

    grid: Grid
    rows: int
    classes: int
    codes: int
    width: int
    depth: int
    heads: int

    @property
    def theirs(self) -> dict[str, Any]:
        """As all three originals take it."""
        return {"dim": self.width, "n_layer": self.depth, "n_head": self.heads, "vocab_size": self.codes,
                "num_classes": self.classes, "block_size": self.grid.n, **NO_DROPOUT}  # fmt: skip


TINY = Size(Grid(6, 6), rows=4, classes=10, codes=50, width=128, depth=4, heads=2)
LARGE = Size(Grid(16, 16), rows=1, classes=1000, codes=16384, width=1024, depth=24, heads=16)
COLD = 1e-5
"""The lowest temperature of the originals: with it they draw the most likely token."""


# --- the originals ----------------------------------------------------------------------------------------


def load(path: Path, name: str, root: Path | None = None) -> Any:
    """A module of a checkout by its file; `root` is searched for what it imports."""
    if root is not None:
        sys.path.insert(0, str(root))
    try:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module
    finally:
        if root is not None:
            sys.path.remove(str(root))


def stand_in_for_missing_packages() -> None:
    """The little of einops and transformers that ARPG's model needs, where they are not installed."""
    if importlib.util.find_spec("einops") is None:
        einops = types.ModuleType("einops")
        patterns = {
            "b n (h d) -> b n h d": lambda x, h: x.unflatten(-1, (h, -1)),
            "b h n d -> b n (h d)": lambda x, h=None: x.transpose(1, 2).flatten(2),
        }
        einops.rearrange = lambda x, pattern, **sizes: patterns[pattern](x, **sizes)  # type: ignore[attr-defined]
        sys.modules["einops"] = einops
    if importlib.util.find_spec("transformers") is None:
        parent, child = types.ModuleType("transformers"), types.ModuleType("transformers.configuration_utils")
        child.PretrainedConfig = object  # type: ignore[attr-defined]
        sys.modules |= {"transformers": parent, "transformers.configuration_utils": child}


def randomise(module: nn.Module) -> None:
    """Weights large enough for varied predictions; the originals start with a head of zeros."""
    for parameter in module.parameters():
        noise = torch.randn_like(parameter)
        parameter.data = 1 + 0.1 * noise if parameter.ndim == 1 else 0.9 / parameter.shape[-1] ** 0.5 * noise


def ours(original: nn.Module, wrapper: str = "model", **settings: Any) -> Any:
    """The adapter with the weights of the original, by way of a file."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weights.pt"
        torch.save({wrapper: original.state_dict()}, file)
        return build(file, **settings)


# --- what is compared -------------------------------------------------------------------------------------


def report(name: str, ours: Tensor, theirs: Tensor) -> bool:
    """Print and judge one comparison: logits and pictures by distance, tokens by equality."""
    if ours.dtype == torch.int64:
        equal = int((ours == theirs).sum())
        print(f"{name:62} {equal} of {ours.numel()} equal")
        return equal == ours.numel()
    error, size = float((ours - theirs).abs().max()), float(theirs.abs().max())
    print(f"{name:62} largest difference {error:.1e} (values up to {size:.1f})")
    return error < 1e-4


def inputs(size: Size, seed: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Tokens, labels, and two kinds of orders."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(size.codes, (size.rows, size.grid.n), generator=generator)
    labels = torch.randint(size.classes, (size.rows,), generator=generator)
    raster = torch.arange(size.grid.n).expand(size.rows, -1).contiguous()
    return tokens, labels, {"random order": random_orders(size.rows, size.grid, generator), "raster": raster}


def incremental(model: AnyOrderModel, tokens: Tensor, labels: Tensor, order: Tensor) -> Tensor:
    """Logits (B, N, V) in order steps from `score` and `append`, one position at a time."""
    state, logits = model.start(len(tokens), labels), []
    for position in order.split(1, dim=1):
        logits.append(model.score(state, position))
        state = model.append(state, position, tokens.gather(1, position))
    return torch.cat(logits, dim=1)


def greedy(model: AnyOrderModel, labels: Tensor, order: Tensor, steps: list[int]) -> Tensor:
    """Most likely tokens (B, N) in raster order, so many positions of the order at once as `steps` says."""
    state, tokens = model.start(len(labels), labels), torch.zeros_like(order)
    for positions in order.split(steps, dim=1):
        drawn = model.score(state, positions).argmax(-1)
        tokens.scatter_(1, positions, drawn)
        state = model.append(state, positions, drawn)
    return tokens


def joint(model: Any) -> Any:
    """The same model in the mode of the published samplers."""
    model.config = dataclasses.replace(model.config, joint_steps=True)
    return model


def cosine_steps(n: int, steps: int) -> list[int]:
    """RandAR's schedule: after i of S steps, n (1 - cos(i pi / 2S)) + 1 positions are drawn, at least i."""
    sizes = [1]
    for i in range(2, steps + 1):
        goal = min(int(n * (1 - math.cos(math.pi / 2 * i / steps)) + 1), n)
        sizes.append(min(max(goal - sum(sizes), 1), n - sum(sizes)))
    return [size for size in sizes if size]


def arccos_steps(n: int, steps: int) -> list[int]:
    """ARPG's schedule: after i of S steps, n 2/pi arccos(i / S) positions are open."""
    sizes: list[int] = []
    for i in range(1, steps):
        done = sum(sizes)
        left = max(1, min(n - done - 1, int(n * math.acos(i / steps) / (math.pi / 2))))
        sizes.append(n - done - left)
    return [*sizes, n - sum(sizes)]


def llamagen_gpt(root: Path, size: Size) -> Iterator[bool]:
    """Teacher forcing and greedy sampling of the raster model."""
    gpt = load(root / "autoregressive/models/gpt.py", "llamagen_gpt", root)
    sampler = load(root / "autoregressive/models/generate.py", "llamagen_generate")
    # Its null label exists only where labels are dropped, and its logits are right only in training mode.
    original = gpt.Transformer(gpt.ModelArgs(**size.theirs, class_dropout_prob=1e-12)).train()
    randomise(original)
    model = ours(original, grid=(size.grid.h, size.grid.w))
    tokens, labels, orders = inputs(size, 0)
    raster = orders["raster"]
    theirs, _ = original(tokens[:, :-1], labels)
    yield report("LlamaGen: logits, raster", model(tokens, labels, raster), theirs)
    if size is LARGE:
        return
    yield report("LlamaGen: logits, raster, incremental", incremental(model, tokens, labels, raster), theirs)
    theirs, _ = original(tokens[:, :-1], torch.full_like(labels, size.classes))
    yield report("LlamaGen: logits, raster, no label", model(tokens, None, raster), theirs)
    original.eval()
    for scale in (1.0, 2.0):
        guided = Guided(model, GuidanceConfig(scale)) if scale != 1 else model
        drawn = sampler.generate(original, labels, size.grid.n, cfg_scale=scale, temperature=COLD)
        found = greedy(guided, labels, raster, [1] * size.grid.n)
        yield report(f"LlamaGen: greedy tokens, guidance {scale:g}", found, drawn.long())


def randar_models(root: Path, size: Size) -> tuple[Any, Any]:
    """The original and the adapter with the same random weights."""
    sys.path.insert(0, str(root))
    original = importlib.import_module("RandAR.model.randar_gpt").RandARTransformer(
        **size.theirs, class_dropout_prob=0.1, grad_checkpointing=False
    )
    randomise(original.eval())
    return original, ours(original, grid=(size.grid.h, size.grid.w))


def randar(root: Path, size: Size) -> Iterator[bool]:
    """Teacher forcing in any order, and parallel sampling with RandAR's schedule."""
    original, model = randar_models(root, size)
    tokens, labels, orders = inputs(size, 1)
    for name, order in orders.items():
        theirs, _, _ = original(tokens, labels, order, targets=tokens)
        yield report(f"RandAR: logits, {name}", model(tokens, labels, order), theirs)
        if size is LARGE:
            return
        found = incremental(model, tokens, labels, order)
        yield report(f"RandAR: logits, {name}, incremental", found, theirs)
    order, n = orders["random order"], size.grid.n
    for steps, scale in ((-1, 1.0), (9, 1.0), (9, 4.0), (20, 4.0)):
        drawn = original.generate(labels, order, (1.0, scale), steps, temperature=COLD)
        original.remove_caches()
        sizes = [1] * n if steps < 0 else cosine_steps(n, steps)
        plain = model if steps < 0 else joint(model)
        guided = Guided(plain, GuidanceConfig(scale, "linear")) if scale != 1 else plain
        name = f"RandAR: greedy tokens, {len(sizes)} steps, guidance {scale:g}"
        yield report(name, greedy(guided, labels, order, sizes), drawn)


def arpg_models(root: Path, size: Size) -> tuple[Any, Any, Any]:
    """The original and the adapter with the same random weights, and the original's module."""
    stand_in_for_missing_packages()
    module = load(root / "models/arpg.py", "arpg_original")
    original = module.Transformer(module.ModelArgs(**size.theirs, class_dropout_prob=0.0))
    randomise(original)
    return original, ours(original, "state_dict", grid=(size.grid.h, size.grid.w)), module


def arpg(root: Path, size: Size) -> Iterator[bool]:
    """Teacher forcing in any order, and parallel sampling with ARPG's schedule."""
    original, model, module = arpg_models(root, size)
    tokens, labels, orders = inputs(size, 2)
    shuffle = module.batch_seq_shuffle
    original.train()  # in evaluation mode its forward pass is not causal
    for name, order in orders.items():
        module.batch_seq_shuffle = lambda x, orders=None, order=order: shuffle(
            x, order if orders is None else orders
        )
        theirs, _ = original(tokens, labels.clone())
        yield report(f"ARPG: logits, {name}", model(tokens, labels, order), theirs)
        if size is LARGE:
            return
        found = incremental(model, tokens, labels, order)
        yield report(f"ARPG: logits, {name}, incremental", found, theirs)
    module.batch_seq_shuffle = shuffle
    original.eval()
    joint(model)
    for steps, scale in ((6, 1.0), (6, 4.0), (12, 4.0)):
        torch.manual_seed(3)
        drawn = original.generate(
            labels.clone(), scale, "constant", temperature=COLD, seq_len=size.grid.n, num_iter=steps
        )
        torch.manual_seed(3)
        torch.rand(size.rows)  # which labels are dropped: none
        order = torch.rand(size.grid.n).argsort().expand(size.rows, -1)
        guided = Guided(model, GuidanceConfig(scale))
        name = f"ARPG: greedy tokens, {steps} steps, guidance {scale:g}"
        yield report(name, greedy(guided, labels, order, arccos_steps(size.grid.n, steps)), drawn)


def vq(root: Path, size: Size) -> Iterator[bool]:
    """Codes and pictures of LlamaGen's tokenizers, at their published size whatever `size` says."""
    module = load(root / "tokenizer/tokenizer_image/vq_model.py", "llamagen_vq")
    for name, factor in (("VQ-16", 16), ("VQ-8", 8)):
        original = module.VQ_models[name]().eval()
        model = ours(original)
        images, grid = torch.rand(2, 3, 64, 96) * 2 - 1, Grid(64 // factor, 96 // factor)
        codes = original.encode(images)[2][2].view(2, -1)
        yield report(f"{name}: codes", model.encode(images), codes)
        pictures = original.decode_code(codes.flatten(), (2, 8, grid.h, grid.w)).clamp(-1, 1)
        yield report(f"{name}: pictures", model.decode(codes, grid), pictures)


def maskgit_vq(root: Path, size: Size) -> Iterator[bool]:
    """Codes and pictures of MaskGIT's tokenizer as RandAR uses it, at its published size."""
    module = load(root / "RandAR/model/maskgit_tokenizer.py", "maskgit_original")
    original = module.MaskGITTokenizer().eval()
    randomise(original.quantize)
    model = ours(original)
    images, grid = torch.rand(2, 3, 64, 64), Grid(4, 4)
    codes = original.encode_indices(images)
    yield report("MaskGIT-VQ: codes", model.encode(images * 2 - 1), codes)
    yield report("MaskGIT-VQ: pictures", (model.decode(codes, grid) + 1) / 2, original.decode(codes))


def main() -> int:
    """Run what checkouts were given for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    checks = {"llamagen": (llamagen_gpt, vq), "randar": (randar, maskgit_vq), "arpg": (arpg,)}
    for name in checks:
        parser.add_argument(f"--{name}", type=Path, metavar="DIR", help="checkout of the original program")
    parser.add_argument("--large", action="store_true", help="GPTs of size L, teacher forcing only")
    arguments = vars(parser.parse_args())
    size = LARGE if arguments.pop("large") else TINY
    given = {name: path for name, path in arguments.items() if path is not None}
    torch.manual_seed(0)
    with torch.no_grad():
        results = [ok for name, path in given.items() for check in checks[name] for ok in check(path, size)]
    print(f"{sum(results)} of {len(results)} comparisons hold (1e-4, or all tokens equal)")
    return 0 if results and all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
