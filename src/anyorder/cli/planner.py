"""Costs of the stages of an experiment, counted without running it."""

import math
import statistics
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

from anyorder.bench import estimates
from anyorder.bench.costs import Cost
from anyorder.bench.fake import Pass
from anyorder.contracts import at_least, require
from anyorder.data import sources
from anyorder.evaluation.features import ClassifierConfig
from anyorder.families import family
from anyorder.files import expanded
from anyorder.inference import weights
from anyorder.method.schedules import reveals
from anyorder.models.transformer import TransformerConfig
from anyorder.stages.experiment import Experiment

FLOAT, GIB = 4, 2**30


class Kind(NamedTuple):
    """Peaks of one GPU; dense matrix products."""

    bf16: float  # FLOP/s; 0 where there are none
    float32: float  # FLOP/s, without TF32, which nothing here uses
    bandwidth: float  # bytes/s
    memory: float  # bytes
    call: float = 0.0  # seconds of each operator, whatever it computes; GPUs compute meanwhile


PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "vq16": ("vq", {}),
    "vq8": ("vq", {"multipliers": (1, 2, 2, 4)}),
    "maskgit-vq": ("maskgit_vq", {}),
    "randar-l": ("randar", {}),
    "randar-xl": ("randar", {"depth": 36, "width": 1280, "heads": 20}),
    "arpg-l": ("arpg", {}),
    "arpg-xl": ("arpg", {"depth": 36, "width": 1280, "heads": 20}),
    "arpg-xxl": ("arpg", {"depth": 48, "width": 1536, "heads": 24}),
}
"""Folders of converted models, by the names that the recipes give them -> kind and size."""
FEATURES = {"inception": 11.4e9, "efficientnet-lite0": 0.8e9}
"""FLOPs of an image in networks that others trained, as their papers count them."""


@dataclass
class PlanConfig:
    """Count parameters, FLOPs, memory, hours and disk of every stage of an experiment; runs nothing."""

    gpus: int = 1
    """Number of GPUs, with one process each."""
    kind: Literal["a100", "h100", "h200", "l40s", "rtx4090", "cpu"] = "h100"
    """Kind of GPU; cpu measures the speed of this machine's matrix products and memory first."""
    efficiency: float = 0.6
    """Share of the peaks that kernels reach, above 0 and at most 1: of FLOP/s in matrix products, of the
    memory's bandwidth in elementwise work and decoding. Take what your own runs show."""
    images: int | None = None
    """Training images, where the data are not on this machine and data.max_train does not say."""
    classes: int = 1000
    """Classes, where the data are not on this machine."""

    def __post_init__(self) -> None:
        at_least(1, self, "gpus", "images")
        at_least(0, self, "classes")
        share = f"efficiency must be a share above 0 and at most 1, got {self.efficiency}"
        require(0 < self.efficiency <= 1, share)


@dataclass
class Costs:
    """Of one stage; bytes in memory are those of one GPU."""

    parameters: int = 0
    tokens: float = 0.0
    """In training: those that it sees."""
    examples: float = 0.0
    """In training: how many it sees, repetitions counted."""
    flops: float = 0.0
    seconds: float = 0.0
    mfu: float = 0.0
    """In training: share of the GPUs' peak FLOP/s in its type."""
    weights: float = 0.0
    """Bytes of weights, averages and DDP's copies of the gradients."""
    optimizer: float = 0.0
    activations: float = 0.0
    """Bytes of activations, gradients included."""
    cache: float = 0.0
    disk: float = 0.0

    @property
    def memory(self) -> float:
        """Bytes on each GPU."""
        return self.weights + self.optimizer + self.activations + self.cache

    def row(self, name: str) -> dict[str, Any]:
        """For the table: what is not there is None."""
        row = {
            "parameters (M)": self.parameters / 1e6,
            "tokens (M)": self.tokens / 1e6,
            "PFLOP": self.flops / 1e15,
            "GiB per GPU": self.memory / GIB,
            "weights": self.weights / GIB,
            "optimizer": self.optimizer / GIB,
            "activations": self.activations / GIB,
            "cache": self.cache / GIB,
            "examples/s": self.examples / max(self.seconds, 1e-9),
            "MFU (%)": 100 * self.mfu,
            "hours": self.seconds / 3600,
            "disk (GB)": self.disk / 1e9,
        }
        return {"stage": name} | {key: value or None for key, value in row.items()}


def update_bytes(weights: int, trained: int, averaged: bool) -> float:
    """Bytes that a step moves: 3 numbers a weight to clip gradients, 7 for AdamW, 3 for an average."""
    return FLOAT * (10 * trained + 3 * weights * averaged)


class Planner:
    """Costs of the stages of an experiment on some GPUs; to be used within `fake.imagined`."""

    known: ClassVar[dict[str, Any]] = {}
    """What was counted, by function and arguments."""

    def __init__(self, experiment: Experiment, config: PlanConfig, kind: Kind):
        self.config, self.kind = config, kind
        made = {experiment.out / name: each for name, each in experiment.stages.items()}
        self.kinds = {path: kind for path, (kind, _) in made.items()}
        self.stages: dict[Path, Any] = {path: stage for path, (_, stage) in made.items()}
        self.here: dict[Path | None, Facts] = {}
        """What was found of the data, by artifact."""

    def costs(self, path: Path) -> Costs | None:
        """Of one stage; None for those that are not counted."""
        count: Callable[[Any], Costs] | None = getattr(self, f"_of_{self.kinds[path]}", None)
        own = getattr(self.stages[path], "network", "")  # an own model, of which nothing is known
        return count(self.stages[path]) if count and not own else None

    def _once(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """The result of a pure function, worked out once."""
        key = f"{work.__qualname__} {arguments}"
        if key not in self.known:
            self.known[key] = work(*arguments)
        return self.known[key]

    def _made(self, kind: str, path: Any) -> Any:
        """The stage of this kind that makes an artifact."""
        text = f"{kind}={path} is no stage of this file: plan needs its settings"
        require(self.kinds.get(path) == kind, text)
        return self.stages[path]

    # --- what the stages work on ------------------------------------------------------------------------

    def _facts(self, data: Path | None) -> "Facts":
        """Of the data artifact."""
        stage = self._made("data", data)
        if data not in self.here:
            self.here[data] = _source(stage)
        here = self.here[data]
        rest = max(here.train - stage.max_validation, 0)  # validation images are cut from those of training
        train: Any = stage.max_train or rest or self.config.images
        text = f"{stage.source} is not here: say how many training images it has, images=NUMBER"
        require(train is not None, text)
        return Facts(
            min(train, rest or train),
            stage.max_validation,
            stage.max_test or here.test or int(stage.test_fraction * train),
            here.classes or self.config.classes,
            here.attributes,
        )

    def _network(self, path: Any, role: str) -> tuple[str, Any]:
        """Kind and configuration of a tokenizer or model that a stage makes, or that lies in a folder."""
        stage: Any = self.stages.get(path)
        if self.kinds.get(path) == "tokenizer":
            return ("vq", stage.model) if stage.init is None else self._network(stage.init, role)
        if self.kinds.get(path) == "train":
            return self._generator(stage)
        if (stored := weights._part(path, role) / weights.CONFIG).is_file():
            return weights._read_config(stored)[::2]
        names = f"known without their files are {', '.join(PUBLISHED)}"
        require(path.name in PUBLISHED, f"{role}={path} is not here: make it first ({names})")
        kind, sizes = PUBLISHED[path.name]
        return kind, family(kind).config_class(**sizes)

    def _tokens_of(self, path: Path | None) -> tuple[Any, "Facts", Any]:
        """The stage that makes the tokens, the images behind it, and its tokenizer's configuration."""
        stage = self._made("tokens", path)
        return stage, self._facts(stage.data), self._network(stage.tokenizer, "tokenizer")[1]

    def _generator(self, stage: Any) -> tuple[str, Any]:
        """Kind and configuration of the model that a train stage makes."""
        tokens, facts, tokenizer = self._tokens_of(stage.tokens)
        grid = self._grid(tokens, tokenizer)
        if stage.init is not None:
            kind, config = self._network(stage.init, "model")
            own = {"location": config.location or stage.model.location} if kind == "transformer" else {}
            return kind, replace(config, grid=grid, num_classes=facts.classes, **own)
        texts = {"text_vocab": tokens.text.vocab_size, "text_length": tokens.text.length}
        return "transformer", TransformerConfig(
            **vars(stage.model), vocab_size=tokenizer.vocab_size, grid=grid, num_classes=facts.classes,
            attributes=facts.attributes, grouped=bool(stage.groups),
            **(texts if self._made("data", tokens.data).captions else {}),
        )  # fmt: skip

    def _grid(self, tokens: Any, tokenizer: Any) -> tuple[int, int]:
        height, width = self._made("data", tokens.data).size
        factor = 2 ** (len(tokenizer.multipliers) - 1)
        return height // factor, width // factor

    # --- time and memory --------------------------------------------------------------------------------

    def _spent(self, cost: Cost, times: float, bf16: bool, reads: bool = False) -> dict[str, Any]:
        """FLOPs and seconds of work that the GPUs share.

        Elementwise work comes on top of matrix products; in decoding, `reads`, products may wait for memory.
        """
        rate, bandwidth = self._rate(bf16), self.kind.bandwidth
        products = cost.seconds(rate, bandwidth) if reads else cost.flops / rate
        computing = (products + cost.elementwise / bandwidth) / self.config.efficiency
        seconds = computing + cost.operators * self.kind.call
        return {"flops": times * cost.flops, "seconds": times * seconds / self.config.gpus}

    def _rate(self, bf16: bool) -> float:
        """Peak FLOP/s of a GPU."""
        return (bf16 and self.kind.bf16) or self.kind.float32

    def _training(self, train: Any, parameters: int, trained: int, one: Pass, averaged: int = 0) -> Costs:
        """A training of `train.steps`, each with passes as `one` that the GPUs share.

        Averages are of all `parameters`, or of so many.
        """
        averaged = averaged or parameters
        times, gpus = train.steps * train.accumulation, self.config.gpus
        averages = (train.ema > 0) + (train.patience > 0)
        sharers = gpus if train.shard else 1
        cost = replace(one.cost, elementwise=0.0, operators=0.0) if train.compile else one.cost
        spent = self._spent(cost, times, train.bf16)
        update = Cost(elementwise=update_bytes(averaged, trained, train.ema > 0))
        spent["seconds"] += self._spent(update, train.steps * gpus / sharers, train.bf16)["seconds"]
        # FSDP keeps a whole copy for evaluations, DDP one of the gradients.
        apart = parameters if sharers > 1 else trained if gpus > 1 else 0
        kept = parameters + averages * averaged
        return Costs(
            parameters=parameters,
            examples=times * train.batch_size,
            mfu=spent["flops"] / spent["seconds"] / gpus / self._rate(train.bf16),
            weights=FLOAT * (kept / sharers + apart),
            optimizer=FLOAT * 2 * trained / sharers,
            activations=one.peak,
            disk=FLOAT * (train.keep * (kept + 2 * trained) + parameters),
            **spent,
        )

    def _passes(self, train: Any) -> int:
        """Passes of a step on each GPU."""
        shared = train.accumulation % self.config.gpus == 0
        text = f"accumulation={train.accumulation} passes cannot be shared by {self.config.gpus} GPUs"
        require(shared, f"{text}: give gpus=NUMBER that divides it")
        return train.accumulation // self.config.gpus

    # --- one method for each kind of stage --------------------------------------------------------------

    def _of_data(self, stage: Any) -> Costs:
        made = next(path for path, each in self.stages.items() if each is stage)
        pixels = math.prod(stage.size) * 3 if stage.cache else 0
        return Costs(disk=sum(self._facts(made)[:3]) * (pixels + 8))

    def _of_tokenizer(self, stage: Any) -> Costs:
        made = next(path for path, each in self.stages.items() if each is stage)
        kind, config = self._network(made, "tokenizer")
        require(kind == "vq", f"{made} starts from a {kind}, which is no VQ tokenizer")
        side, bf16 = self._made("data", stage.data).size, stage.train.bf16 and self.kind.bf16 > 0
        sizes = (config, stage.loss, side, stage.train.batch_size, bf16, min(2, self._passes(stage.train)))
        parameters, one = self._once(estimates.train_tokenizer, *sizes)
        own = self._once(estimates.parameters, kind, config)  # the discriminator has no average
        return self._training(stage.train, parameters, parameters, one, own)

    def _of_features(self, stage: Any) -> Costs:
        facts, side = self._facts(stage.data), min(self._made("data", stage.data).size)
        seen = min(stage.max_train, facts.train) + facts.validation + facts.test
        if stage.extractor != "classifier":
            spent = self._spent(Cost(FEATURES.get(stage.extractor, 0.0)), seen, False)
            return Costs(disk=FLOAT * seen * 3056, **spent)
        config = ClassifierConfig(max(2, facts.classes), side, stage.channels)
        bf16 = stage.train.bf16 and self.kind.bf16 > 0
        sizes = (config, stage.train.batch_size, bf16, min(2, self._passes(stage.train)))
        parameters, one = self._once(estimates.train_classifier, *sizes)
        return self._training(stage.train, parameters, parameters, one)

    def _of_tokens(self, stage: Any) -> Costs:
        kind, config = self._network(stage.tokenizer, "tokenizer")
        facts, side = self._facts(stage.data), self._made("data", stage.data).size
        parameters, encode, _ = self._once(estimates.code, kind, config, stage.batch_size, side)
        images = facts.train * self._copies(stage) + facts.validation + facts.test
        h, w = self._grid(stage, config)
        return Costs(
            parameters=parameters, weights=FLOAT * parameters, activations=encode.peak,
            disk=images * (FLOAT * h * w + 8), **self._spent(encode.cost, images / stage.batch_size, False),
        )  # fmt: skip

    @staticmethod
    def _copies(tokens: Any) -> int:
        """How many token sets each training image has."""
        return (5 if tokens.crops else 1) * (2 if tokens.mirror else 1)

    def _of_train(self, stage: Any) -> Costs:
        kind, config = self._generator(stage)
        n, train = math.prod(config.grid), stage.train
        sizes: list[Any] = [reveals(n, steps, stage.groups_schedule) for steps in stage.groups] or [None]
        bf16, passes = train.bf16 and self.kind.bf16 > 0, min(2, self._passes(train))
        given = (kind, config, stage.lora, train.batch_size, bf16, passes)
        each = [self._once(estimates.train_generator, *given, some) for some in sizes]
        parameters, trained, _ = each[0]
        mean = (statistics.mean(some) for some in zip(*(astuple(x.cost) for *_, x in each), strict=True))
        found = self._training(train, parameters, trained, Pass(Cost(*mean), max(x.peak for *_, x in each)))
        found.tokens = train.steps * train.accumulation * train.batch_size * n
        return found

    def _of_orders(self, stage: Any) -> Costs:
        kind, config = self._network(stage.model, "model")
        tokens, facts, tokenizer = self._tokens_of(stage.tokens)
        n = math.prod(self._grid(tokens, tokenizer))
        images = min(stage.limit or math.inf, facts.train * self._copies(tokens))
        images += sum(min(stage.test_limit, split) for split in (facts.validation, facts.test))
        # As `inference.device.images_at_once` on a GPU with nothing else in its memory.
        fit = int(self.kind.memory / 2 / (4 * config.depth * n * config.width * FLOAT))
        batch = stage.batch_size or 2 ** (min(max(fit, 1), 1024).bit_length() - 1)
        found = self._decoded(kind, config, n, stage.policy, images, batch, stage.bf16)
        found.disk = images * n * (2 + FLOAT)
        return found

    def _decoded(
        self, kind: str, config: Any, n: int, policy: Any, images: float, size: int, bf16: bool, rows: int = 1
    ) -> Costs:
        """Images that are generated, or whose orders are extracted; so many rows of the model for each."""
        steps = len(policy.sizes(n)) if policy.parallel else n
        # Where nothing is rated, what was chosen before is scored: at the last step, and between two ratings.
        unrated = steps + 1 - math.ceil(steps / policy.rate_every)
        scored = policy.evaluations(n) + unrated if policy.inferred else n
        # Of candidates that shrink to none, most are scored while a third of the image is known.
        known = n // 3 if policy.inferred else n // 2
        many = max(1, min(round(scored / steps), n - known))
        bf16 = bf16 and self.kind.bf16 > 0
        most = n - 1 if policy.inferred else many
        sizes = (kind, config, size * rows, known, many, max(1, round(n / steps)), most, bf16)
        parameters, one, cache = self._once(estimates.decoding_step, *sizes)
        share = scored / steps / many  # where fewer candidates are left than are scored in the mean
        spent = self._spent(one.cost, share * steps * images / size, bf16, reads=True)
        bytes_each = 2 if bf16 else FLOAT
        return Costs(parameters, weights=bytes_each * parameters, activations=one.peak, cache=cache, **spent)

    def _of_sample(self, stage: Any) -> Costs:
        kind, config = self._network(stage.model, "model")
        tokens, _, _ = self._tokens_of(stage.tokens or getattr(self.stages.get(stage.model), "tokens", None))
        made = self._network(stage.tokenizer or tokens.tokenizer, "tokenizer")
        side, guided = self._made("data", tokens.data).size, 1 + (self._scale(stage) != 1)
        n = math.prod(self._grid(tokens, made[1]))
        bf16 = stage.bf16 and not stage.policy.decided
        found = self._decoded(kind, config, n, stage.policy, stage.num_images, stage.batch_size, bf16, guided)
        parameters, _, decode = self._once(estimates.code, *made, stage.batch_size, side)
        more = self._spent(decode.cost, stage.num_images / stage.batch_size, False)
        found.flops, found.seconds = found.flops + more["flops"], found.seconds + more["seconds"]
        found.weights += FLOAT * parameters
        found.disk = stage.num_images * (math.prod(side) * 3 + 10 * n + 12)
        return found

    @staticmethod
    def _scale(stage: Any) -> float:
        """The guidance scale; of a search, or of images with a search's best one, some other than 1."""
        searched = getattr(stage, "settings", None) is not None or getattr(stage, "scales", (1,)) != (1,)
        return 2.0 if searched else stage.guidance.scale

    def _of_tune(self, stage: Any) -> Costs:
        found = self._of_sample(stage)
        points = len(stage.temperatures) * len(stage.scales)
        return replace(found, flops=points * found.flops, seconds=points * found.seconds)

    def _of_eval(self, stage: Any) -> Costs:
        samples = self._made("sample", stage.samples)
        extractor = self._made("features", stage.features).extractor
        spent = self._spent(Cost(FEATURES.get(extractor, 0.0)), samples.num_images, False)
        return Costs(disk=FLOAT * 3056 * samples.num_images, **spent)

    def _of_pipeline(self, stage: Any) -> Costs:
        model = self._network(stage.model or self._made("sample", stage.samples).model, "model")
        parameters = self._once(estimates.parameters, *model)
        return Costs(parameters=parameters, disk=FLOAT * parameters)


class Facts(NamedTuple):
    """Numbers of images of each split, of classes, and of values of each attribute."""

    train: int
    validation: int
    test: int
    classes: int
    attributes: tuple[int, ...] = ()


def _source(stage: Any) -> Facts:
    """Of the source of a data stage on this machine; zeros where it is not, and one value an attribute."""
    if (name := stage.source) == "sunsets":
        return Facts((stage.max_train or 20_000) + stage.max_validation, 0, stage.max_test or 2_000, 4)
    if not expanded(name).exists():
        return Facts(0, 0, 0, 0, (1,) * len(stage.attributes))
    columns = sources.Columns(stage.label, attributes=tuple(stage.attributes), image=stage.image)
    source = sources.open_source(name, columns, stage.test_fraction)
    sizes = tuple(max(1, len(values)) for values in source.attributes().values())
    return Facts(source.count("train"), 0, source.count("test"), len(source.classes()), sizes)
