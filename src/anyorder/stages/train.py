"""The stage that trains the any-order model, on random orders, one fixed order, or extracted orders."""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from anyorder import families
from anyorder import orders as static
from anyorder.contracts import AnyOrderNetwork, require
from anyorder.data import caches
from anyorder.data.images import to_uint8
from anyorder.data.rows import evenly_spaced
from anyorder.inference import figures, weights
from anyorder.inference.device import device
from anyorder.method import loss as losses
from anyorder.method import policy_config, schedules
from anyorder.method.decoding import sample
from anyorder.method.sampling import Streams
from anyorder.models import transformer
from anyorder.stages import artifacts, common
from anyorder.training import learnt_orders, lora, order_sources
from anyorder.training.config import TrainConfig
from anyorder.training.trainer import train

Measured = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Tokens (n, N), conditions (n, ...) and orders (n, N) that a likelihood is measured on."""
MEASURED = 512
"""Images that are measured during training."""

COMPILED = "train.compile covers models without a location head and without groups: leave one of them out"


@dataclasses.dataclass
class TrainStage(common.TrainingStage):
    """Train the any-order model; with `orders`, fine-tune it on an order cache. The loss is the same.

    With `model.location` the location head learns the extracted orders beside the tokens, and the loss is the
    bound -log q(order, x) / N.
    """

    inputs: ClassVar[tuple[str, ...]] = ("tokens", "orders", "init")
    references: ClassVar[tuple[str, ...]] = ("tokenizer",)
    tokens: Path
    """Token cache to train on."""
    order: str = "random"
    """random, or a static order (raster, hilbert, ...) for a model of that order alone."""
    orders: Path | None = None
    """Order cache to train on instead; only the images it covers are used, with orders_as=class_mean all."""
    orders_as: Literal["own", "class_mean"] = "own"
    """own: the order of each image; class_mean: one order per class, the ranking of its mean ranks."""
    online: policy_config.PolicyConfig | None = None
    """Instead of `orders`: extract orders by this policy while training, with the averaged weights."""
    online_every: int = 1
    """With `online`: epochs between two extractions of an image's order, at least 1."""
    jitter: float = 0.0
    """Standard deviation in steps of noise on the ranks of orders, against memorizing one order per image."""
    random_share: float = 0.0
    """With `orders`, `online` or a static order: share of images that get a random order, in [0, 1]."""
    random_share_end: float | None = None
    """Change that share linearly to this value; by default it stays."""
    random_share_ramp: tuple[float, float] = (0.0, 1.0)
    """Where in the training that change begins and ends, as shares of its steps: [0.25, 0.75] is a plateau, a
    ramp and a plateau, as in RAR (arXiv 2411.00776)."""
    learn_orders: int = 0
    """With a location head, instead of given orders: so many for each image, 2 or more, are sampled from the
    head at each step, which learns by what they cost the tokens. Start from a model whose head knows orders
    (init=...). A step takes so many times the computation, and the time of sampling so many images."""
    groups: tuple[int, ...] = ()
    """Numbers of steps, for example 64,32,16,8, to sample in any of them later: positions of one step are
    predicted together, in as many steps as one of these, drawn anew at every training step. By default,
    always one by one."""
    groups_schedule: schedules.Shape = "constant"
    """With `groups`: how the steps share the positions, as in sampling."""
    init: Path | None = None
    """Model to start from; it brings its architecture, to which `model.location` may add a head. A converted
    one gets the classes and the grid of the tokens."""
    init_share: float = 0.0
    """With `init`: share of its weights in the average with the trained ones that is written, in [0, 1). 0.5
    keeps what the first model could (here, to fill holes), as in arXiv 2109.01903."""
    lora: int = 0
    """With `init`: train low-rank updates of this rank, which are merged at the end, and the class table; 0
    trains all weights."""
    tokenizer: Path | None = None
    """Where the tokenizer of the tokens is, if it was moved; for train.sample_every."""
    network: str = ""
    """Own any-order model instead of the transformer, package.module:Class, a `contracts.AnyOrderNetwork`."""
    network_settings: dict[str, str] = dataclasses.field(default_factory=dict)
    """With `network`: settings of its configuration; the tokens say vocab_size, grid and num_classes."""
    model: transformer.Architecture = dataclasses.field(default_factory=transformer.Architecture)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        allowed = ("random", *static.STATIC)
        known = self.order in allowed or families.is_own("policies", self.order)
        text = f"order must be one of {', '.join(allowed)}, or package.module:Name, got '{self.order}'"
        require(known, text)
        for share in (self.random_share, self.random_share_end or 0.0):
            require(0 <= share <= 1, f"random_share must lie in [0, 1], got {share}")
        begin, until = self.random_share_ramp
        text = f"random_share_ramp must be two shares of the steps, 0 <= a < b <= 1, got {begin}, {until}"
        require(0 <= begin < until <= 1, text)
        text = "random_share_ramp goes with random_share_end: give both"
        require(self.random_share_end is not None or (begin, until) == (0.0, 1.0), text)
        require(self.jitter >= 0, f"jitter must be >= 0 steps, got {self.jitter}")
        both = f"give either order={self.order} or orders={self.orders}, not both"
        require(self.orders is None or self.order == "random", both)
        cache = f"orders_as={self.orders_as} is about an order cache: give orders=FOLDER"
        require(self.orders_as == "own" or self.orders is not None, cache)
        every = f"online_every must be >= 1 epoch and goes with online, got {self.online_every}"
        require(self.online_every == 1 or (self.online_every > 1 and self.online is not None), every)
        if self.online is not None:
            self._check_online(self.online)
        elif self.orders is None and self.order == "random":
            mixing = ("random_share", "random_share_end", "jitter")
            mixed = any(getattr(self, key) != getattr(TrainStage, key) for key in mixing)
            text = f"{', '.join(mixing)} go with orders=... or a static order: all orders are random here"
            require(not mixed, text)
            text = "model.location needs orders to learn: give orders=..., a static order or learn_orders=2"
            require(not self.model.location or self.learn_orders > 0, text)
        text = "model.location_gradient is about a location head: give model.location=true, or leave it out"
        require(self.model.location or self.model.location_gradient, text)
        self._check_learnt()
        require(not (self.train.compile and (self.model.location or self.groups)), COMPILED)
        text = "init_share must lie in [0, 1) and goes with init=..., without lora and model.location, got"
        alike = self.init is not None and not self.lora and not self.model.location
        require(self.init_share == 0 or (0 < self.init_share < 1 and alike), f"{text} {self.init_share}")
        low_rank = f"lora must be a rank >= 0 and goes with init=..., got {self.lora}"
        require(self.lora == 0 or (self.lora > 0 and self.init is not None), low_rank)
        own = bool(self.network) and (self.init is not None or self.model != transformer.Architecture())
        require(not own, "network=... is a new model of its own: remove init and the model.* settings")
        alone = f"network_settings go with network=..., got {self.network_settings}"
        require(bool(self.network) or not self.network_settings, alone)
        plain = dataclasses.replace(self.model, location=False, location_gradient=True)
        fits = self.init is None or plain == transformer.Architecture()
        require(fits, "init=... brings its architecture: remove the model.* settings")
        shown = self.tokenizer is None or self.train.sample_every > 0
        require(shown, "tokenizer is for images during training: give train.sample_every > 0, too")
        kinds = ("nll", "bound") if self.model.location or self.init else ("nll",)
        splits = ("train", "validation", "test")
        text = "groups must list numbers of steps >= 1, and groups_schedule goes with it, got"
        valid = min(self.groups, default=1) >= 1 and (self.groups or self.groups_schedule == "constant")
        require(bool(valid), f"{text} {list(self.groups)} and {self.groups_schedule}")
        self.train.require_watched([f"{split}_{kind}" for split in splits for kind in kinds])

    def _check_learnt(self) -> None:
        text = f"learn_orders must be 0, or at least 2 orders for each image, got {self.learn_orders}"
        require(self.learn_orders == 0 or self.learn_orders >= 2, text)
        given = (self.orders, self.online, self.groups, self.train.compile, self.train.shard)
        text = "learn_orders takes no orders, online, order, groups, train.compile, train.shard: leave them"
        require(not self.learn_orders or (self.order == "random" and not any(given)), f"{text} out")
        text = "learn_orders needs a location head: give init=... with one, or model.location=true"
        require(not self.learn_orders or self.model.location or self.init is not None, text)

    def _check_online(self, policy: policy_config.PolicyConfig) -> None:
        alone = self.orders is None and self.order == "random"
        require(alone, "online extracts the orders itself: give it, or orders=..., or order=...")
        require(policy.decided, f"online.order must be an inferred order, got '{policy.order}'")
        text = "online extracts no class orders and counts evaluations: leave class_weight, entropy_limit out"
        require(not (policy.by_class or policy.adaptive), text)
        require(self.train.ema > 0, "online extracts with the averaged weights: give train.ema, say 0.999")

    @property
    def _all_random(self) -> bool:
        """Whether no order says anything of where to go."""
        given = self.orders is not None or self.online is not None or self.learn_orders > 0
        return self.order == "random" and not given

    def _check_head(self, headed: bool) -> None:
        """What a model with, or without, a location head cannot be trained to."""
        text = f"needs a location head, {self.init} has none: give model.location=true"
        require(headed or not self.learn_orders, f"learn_orders {text}")
        online = self.online is not None and self.online.uses_head
        require(headed or not online, f"online.order={getattr(self.online, 'label', '')} {text}")
        require(not (headed and self.train.compile) or self._all_random, COMPILED)
        kinds = ("nll", "bound") if headed else ("nll",)
        watched = caches.splits(self.tokens)[:2]
        self.train.require_watched([f"{split}_{kind}" for split in watched for kind in kinds])

    @property
    def aside(self) -> tuple[str, ...]:
        """Settings that do not change what the stage writes."""
        return ("tokenizer", *super().aside)

    def run(self, artifact: artifacts.Artifact) -> dict[str, Any]:
        """Write the model and its log; where there is a validation split, the test split is measured last."""
        tokens, *held = (caches.TokenSet(self.tokens, split) for split in caches.splits(self.tokens))
        watched = [tokens, held[0]]
        model = self._model(tokens)
        self._check_head(_has_location(model))
        if self._all_random and _has_location(model):  # nothing to learn from: its weights would only decay
            model.location.requires_grad_(False)
        first = [x.detach().clone() for x in model.parameters()] if self.init_share else []
        cache = None if self.orders is None else caches.OrderSet(self.orders)
        if cache is not None:
            caches.check_tokens(cache, tokens)
        source = self._source(artifact.folder, tokens, cache)
        own = cache if self.orders_as == "own" else None
        online = source if isinstance(source, order_sources.OnlineOrders) else None
        orders = order_sources.mixed_orders(source, tokens.grid, self._random_share, self.jitter)

        def loss(model: torch.nn.Module, rows: np.ndarray, step: int, generator: torch.Generator) -> Any:
            found = tokens.batch(own.rows[rows] if own else rows, generator=generator)
            batch, labels = (caches.without_waiting(x, device()) for x in found)
            if self.learn_orders:
                return learnt_orders.loss(model, batch, labels, self.learn_orders, generator)
            found = orders(rows, step, generator)
            order, learnt = (caches.without_waiting(x, device()) for x in found)
            steps = self._steps(tokens.grid.n, generator)
            if self._all_random or not _has_location(model):
                return losses.token_nll(model, batch, labels, order, **steps).mean(), {}  # type: ignore[arg-type]
            content, where = losses.joint_nll(model, batch, labels, order, **steps)  # type: ignore[arg-type]
            where = where * learnt[:, None]  # a random order says nothing of where to go
            share = learnt.float().mean().clamp(min=1e-6)
            parts = {"content": content.mean(), "location": where.mean() / share}
            return content.mean() + where.mean(), parts

        measured = [(some.split, self._measured(some, cache)) for some in (tokens, *held)]

        def evaluate(model: torch.nn.Module, step: int, splits: int = len(watched)) -> dict[str, float]:
            found = {split: _mean_nll(model, self._in_order(model, x)) for split, x in measured[:splits]}
            return {f"{split}_{name}": value for split, x in found.items() for name, value in x.items()}

        result = train(
            model, loss, len(own or tokens), self.train, artifact.folder,
            device=device(), evaluate=evaluate, sample=self._preview(artifact.folder),
            ready=online.set_scorer if online else None,
        )  # fmt: skip
        if not artifact.leads:
            return {}
        lora.merge_low_rank(result.model)
        for after, start in zip(result.model.parameters(), first, strict=False):
            after.detach().lerp_(start, self.init_share)
        weights.save_model(artifact.folder, result.model, model.config, families.kind_of(result.model))
        before = self._trained_before()
        return {
            **evaluate(result.model, result.steps, len(measured)),
            **{k: v for some in held for k, v in self._nll_of_general_orders(result.model, some).items()},
            "training_tokens": result.examples * tokens.grid.n + before["training_tokens"],
            "training_seconds": result.seconds + before["training_seconds"],
            **({"extraction_evaluations": online.evaluations()} if online else {}),
            **common.training_facts(result),
        }

    def _trained_before(self) -> dict[str, Any]:
        """Training behind the model to start from, or else behind the model that the orders come from."""
        if self.init is not None:
            return common.trained_before(self.init)
        if self.orders is not None:
            return caches.OrderSet(self.orders).scorer
        return {"training_tokens": 0, "training_seconds": 0.0}

    # --- the model --------------------------------------------------------------------------------------

    def _model(self, tokens: caches.TokenSet) -> AnyOrderNetwork:
        torch.manual_seed(self.train.seed)
        sizes: dict[str, Any] = {"vocab_size": tokens.vocab_size, "grid": (tokens.grid.h, tokens.grid.w)}
        sizes |= {"num_classes": len(tokens.classes)}
        if self.network:
            return self._own_network(tokens, sizes)
        if self.init is None:
            self._require_conditions(tokens)
            attributes = tuple(len(values) for values in tokens.attributes.values())
            sizes |= {"text_vocab": tokens.text_vocab, "text_length": tokens.text_length}
            sizes |= {"attributes": attributes, "grouped": bool(self.groups)}
            return transformer.AnyOrderTransformer(transformer.TransformerConfig(**vars(self.model), **sizes))
        common.require_trained_on(self.init, tokens, adapted=True)
        model = weights.load_any_order(self.init)
        if common.is_converted(self.init):
            further = f"a published model takes classes alone, {tokens.folder} has attributes or captions: "
            require(not tokens.further.shape[1], f"{further}run data and tokens without them")
            known = common.known_classes(self.init, tokens, model.num_classes)
            model = lora.adapt(model, tokens.grid, len(tokens.classes), known)
        if self.model.location and not _has_location(model):
            if not isinstance(model, transformer.AnyOrderTransformer):
                raise ValueError(f"a {type(model).__name__} takes no location head: remove model.location")
            head = {"location": True, "location_gradient": self.model.location_gradient}
            larger = transformer.AnyOrderTransformer(dataclasses.replace(model.config, **head)).to(device())
            larger.load_state_dict(model.state_dict(), strict=False)
            model = larger
        elif not self.model.location_gradient:
            raise ValueError(f"{self.init} brings location_gradient with its head: leave the setting out")
        if self.groups:
            if not isinstance(model, transformer.AnyOrderTransformer):
                raise ValueError(f"a {type(model).__name__} predicts no groups: remove groups")
            model.config.grouped = True
        if self.lora:
            lora.add_low_rank(model, self.lora)
        return model.train()

    def _own_network(self, tokens: caches.TokenSet, sizes: dict[str, Any]) -> AnyOrderNetwork:
        further = "an own network takes classes alone: run data and tokens without attributes and captions"
        require(not tokens.further.shape[1], further)
        model = weights.new_model(self.network, self.network_settings | sizes)
        if not isinstance(model, AnyOrderNetwork):
            raise ValueError(f"{self.network} must be a contracts.AnyOrderNetwork")
        grouped = not self.groups or hasattr(model, "score_group")
        require(grouped, f"{self.network} predicts no groups (contracts.GroupingModel): remove groups")
        return model

    def _require_conditions(self, tokens: caches.TokenSet) -> None:
        """A ValueError for dropout of conditions that the tokens do not have."""
        parts = tokens.further.shape[1]
        for name, some in (("label_dropout", len(tokens.classes) + parts), ("part_dropout", parts)):
            default = getattr(self.model, name) == getattr(transformer.Architecture, name)
            text = f"model.{name} has nothing to hide: {tokens.folder} has no "
            text += f"{'classes' if name == 'label_dropout' else 'attributes or captions'}; leave it out"
            require(bool(some) or default, text)

    # --- the orders to train on -------------------------------------------------------------------------

    def _source(
        self, folder: Path, tokens: caches.TokenSet, cache: caches.OrderSet | None
    ) -> order_sources.Source:
        if self.online is not None:
            per_step = self.train.batch_size * self.train.accumulation
            return order_sources.OnlineOrders(
                folder, tokens, self.online, self.online_every, per_step, warm=self.init is not None
            )
        if cache is not None and self.orders_as == "class_mean":
            return lambda rows, _: cache.of_classes(tokens.batch(rows)[1])
        if cache is not None:
            return lambda rows, _: cache.batch(rows)
        if self.order == "random":
            return lambda *_: None
        fixed = self._fixed_order(tokens)
        return lambda rows, _: fixed.expand(len(rows), -1)

    def _steps(self, n: int, generator: torch.Generator) -> losses.Steps:
        """How many positions each step of the batch reveals; nothing where that is one."""
        if not self.groups:
            return {}
        steps = self.groups[int(torch.randint(len(self.groups), (), generator=generator))]
        return {"sizes": schedules.reveals(n, steps, self.groups_schedule)}

    def _random_share(self, step: int) -> float:
        end = self.random_share if self.random_share_end is None else self.random_share_end
        begin, until = self.random_share_ramp
        done = (step - 1) / max(1, self.train.steps - 1)
        done = min(max((done - begin) / (until - begin), 0.0), 1.0)
        return self.random_share + (end - self.random_share) * done

    # --- what is measured: the likelihood under the orders of training, on training and test images -----

    def _measured(self, tokens: caches.TokenSet, cache: caches.OrderSet | None) -> Measured:
        """Images of a split with the orders that are trained on, at most `MEASURED`."""
        if cache is None:
            rows = evenly_spaced(MEASURED, len(tokens))
            return *tokens.batch(rows), self._general_orders(tokens, len(rows))
        training, own = tokens.split == "train", self.orders_as == "own"
        if own and not training:
            orders = cache.held_out(tokens.split)
            return *tokens.batch(evenly_spaced(len(orders), len(tokens))), orders
        rows = evenly_spaced(MEASURED, len(cache if training and own else tokens))
        batch, condition = tokens.batch(cache.rows[rows] if training and own else rows)
        return batch, condition, cache.batch(rows) if own else cache.of_classes(condition)

    def _in_order(self, model: torch.nn.Module, data: Measured) -> Measured:
        """The data, in orders from the head where it learns them: `nll` is then their bound."""
        tokens, condition, order = (x.to(device()) for x in data)
        if self.learn_orders and len(tokens):
            order = learnt_orders.sample_orders(model, tokens, condition, range(len(tokens)))
        return tokens, condition, order

    def _general_orders(self, tokens: caches.TokenSet, n: int) -> torch.Tensor:
        """The static order of training for n images, or random ones."""
        if self.order == "random":
            return static.random_orders(n, tokens.grid, torch.Generator().manual_seed(0))
        return self._fixed_order(tokens).expand(n, -1)

    def _fixed_order(self, tokens: caches.TokenSet) -> torch.Tensor:
        """The order of every image, (N,) int64: a static one, or what an own function says of the grid."""
        policy = policy_config.make_policy(self.order, tokens.grid, Streams([0]))
        text = f"order={self.order} chooses as it generates: give a function of the grid, or extract orders"
        require(isinstance(policy, policy_config.policies.FixedOrder) and policy.order.ndim == 1, text)
        assert isinstance(policy, policy_config.policies.FixedOrder)
        return policy.order

    def _nll_of_general_orders(self, model: torch.nn.Module, held: caches.TokenSet) -> dict[str, float]:
        """Under the order of training on the whole split; for extracted orders, under random ones."""
        extracted = self.orders is not None or self.online is not None or self.learn_orders > 0
        rows = evenly_spaced(MEASURED if extracted else len(held), len(held))
        found = _mean_nll(model, (*held.batch(rows), self._general_orders(held, len(rows))))
        if not extracted:
            return {f"{held.split}_{name}": value for name, value in found.items()}
        name = f"{held.split}_any_order_nll" if held.split == "validation" else "any_order_nll"
        return {name: found["nll"]} if found else {}

    def _preview(self, folder: Path) -> Any:
        """A hook that saves a few samples, classes in turn, always from the same seeds; None if off."""
        if not self.train.sample_every:
            return None
        tokenizer = self.tokenizer or artifacts.recorded_input(self.tokens, "tokenizer")
        assert tokenizer is not None, "every token cache has a tokenizer"
        common.require_made_from(self.tokens, "tokenizer", tokenizer)

        def preview(model: torch.nn.Module, step: int) -> dict[str, Any]:
            assert isinstance(model, AnyOrderNetwork)
            streams = Streams(range(common.SHOWN), device())
            labels = torch.arange(common.SHOWN, device=device()) % max(1, model.num_classes)
            made = sample(model, self._shown_order(labels), streams, condition=labels)
            images = to_uint8(weights.load_tokenizer(tokenizer).decode(made.tokens, model.grid))
            shown = figures.image_grid(images)
            figures.save_image(shown, folder / f"samples/step-{step:08d}.png")
            orders = made.order[:8].cpu().numpy()
            return {"samples": shown, "orders": figures.order_panel(images[:8], orders, model.grid)}

        return preview

    def _shown_order(self, labels: torch.Tensor) -> policy_config.Order:
        """The order that the model is trained on, for images of some classes."""
        if self.orders is None:
            return "location" if self.learn_orders else self.online or self.order
        if self.orders_as == "class_mean":
            return caches.OrderSet(self.orders).of_classes(labels)
        return policy_config.stored_policy(caches.OrderSet(self.orders).policy_settings)


def _mean_nll(model: torch.nn.Module, data: Measured) -> dict[str, float]:
    """`losses.image_nll` of the data, averaged; empty if there are no data."""
    tokens, condition, order = (x.to(device()) for x in data)
    if not len(tokens):
        return {}
    found = losses.image_nll(model, tokens, condition, order, location=_has_location(model))  # type: ignore[arg-type]
    return {name: float(value.mean()) for name, value in found.items()}


def _has_location(model: torch.nn.Module) -> bool:
    """Whether a location head is trained, too; published models have none."""
    return getattr(model.config, "location", False)
