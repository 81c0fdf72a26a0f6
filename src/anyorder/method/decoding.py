"""The one loop: score open positions, put a token on each, reveal some, repeat.

Sampling in a given order, sampling with inferred locations, order extraction and completion are all
`generate` with another policy and another source of tokens (OAR, arXiv 2504.17069 v1, Sec. 3).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from anyorder.contracts import AnyOrderModel, Grid, Progress, Step, Trace, require
from anyorder.method import sampling as draws
from anyorder.method.guidance import rating_log_probs
from anyorder.method.policy_config import Order, make_policy
from anyorder.method.sampling import Sampling, Streams

Content = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(positions (B, M), log-probabilities (B, M, V), uniform (B, M)) -> tokens (B, M)."""

ROWS = {"cpu": 2**10, "cuda": 2**14}
"""Candidates of all images together that are scored at once: enough to keep the device busy. On a CPU, where
more fall out of its cache, 512 to 2048 were measured to be equally fast, 256 slower."""
LOGITS = 2**26
"""Logits held at once, 256 MiB in float32: fewer candidates where the codebook is large."""


class GenerationOptions(TypedDict, total=False):
    """Keyword arguments of `generate` and of all functions that call it; every one may be left out."""

    condition: Tensor | None
    """(B,) class labels or (B, 1 + A + L), see `contracts`; integers. None: unconditional."""
    grid: Grid | None
    """The grid to generate on; by default the one that the model was trained on."""
    sampling: Sampling
    """Temperature and truncation of sampled tokens."""
    scorer: AnyOrderModel | None
    """The scoring model, which decides where; by default the generator itself. For a generator that was
    fine-tuned on the orders of this model: it then scores chosen positions only. Unused by fixed orders."""
    chunk: int | None
    """Candidates per image that are scored at once; by default as many as `ROWS` and `LOGITS` allow."""


@torch.no_grad()
def generate(
    model: AnyOrderModel,
    order: Order,
    streams: Streams,
    *,
    targets: Tensor | None = None,
    known: tuple[Tensor, Tensor] | None = None,
    condition: Tensor | None = None,
    grid: Grid | None = None,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    scorer: AnyOrderModel | None = None,
    chunk: int | None = None,
) -> Iterator[Step]:
    """Reveal every open position, step by step; progress bars and animations read this stream.

    Candidates evaluated per image of N positions: N for a fixed order and for the location head; for an
    inferred order N (N + 1) / 2, about the share `rescore` of it if that is below 1, and another N by the
    generator if it is token-blind; expected information (1 + `look_ahead`) times that.
    Memory: the model's cache, O(depth * B * N * D), plus O(B * chunk * (D + V)).

    Args:
        model: any-order model, the generator: it decides what.
        order: where to go; whatever `make_policy` takes.
        streams: one random stream per image; their number is the batch size B >= 1.
        targets: (B, N) int64, raster order: put these tokens instead of sampled ones (order extraction).
        known: positions (B, K) and tokens (B, K) that are given, revealed first.
        condition: this and what follows: see `GenerationOptions`.

    Yields:
        Step: after each reveal.

    Raises:
        ValueError: no images, an order that `make_policy` refuses, a separate scorer for a policy that looks
            at the generator's tokens, a policy that needs a location head and a model without one, or logits
            that are not finite.
    """
    grid = grid or model.grid
    require(len(streams) > 0, "there are no images to generate: give at least one random stream")
    policy = make_policy(order, grid, streams)
    peeks = f"'{policy.name}' looks at the generator's tokens, so no other model can score: leave scorer out"
    require(scorer is None or policy.token_blind, f"{peeks}, or choose a token-blind order")
    headless = f"'{policy.name}' asks a location head: this model has none, choose another order"
    require(not policy.located or hasattr(scorer or model, "locate"), headless)
    # The last of the models decides where; it needs a state only if the policy asks it anything.
    models = [model, scorer] if scorer is not None and (policy.rated or policy.located) else [model]
    content = sampled(sampling) if targets is None else given(targets)
    condition = None if condition is None else condition.to(streams.device, torch.int64)
    states = [each.start(len(streams), condition, grid) for each in models]
    progress = Progress.start(grid, len(streams), streams.device)
    finite = torch.ones((), dtype=torch.bool, device=streams.device)
    if known is not None and known[0].shape[1]:
        states = [each.append(state, *known) for each, state in zip(models, states, strict=True)]
        progress.give(known[0])
    while progress.open:
        # Every step takes the same numbers from each stream, used or not: a sample then does not depend on
        # the number of candidates, on chunks, or on the other images of the batch.
        uniform, progress.noise = streams.uniform(grid.n), streams.gumbel(grid.n)
        scoring_model, scoring_state = models[-1], states[-1]
        if policy.located:
            progress.location = scoring_model.locate(scoring_state, progress.revealed)  # type: ignore[attr-defined]
        candidates = policy.propose(progress)
        ratings = torch.zeros_like(candidates, dtype=torch.float32)
        if policy.rated:
            proposed = no_content if policy.token_blind else content
            tokens, log_prob, ratings = score_candidates(
                scoring_model, scoring_state, candidates, proposed, uniform, policy.rate, chunk
            )
            progress.ratings.scatter_(1, candidates, ratings)
            progress.rated_at.scatter_(1, candidates, progress.step)
        if policy.look_ahead:
            candidates, ratings = expected_information(
                scoring_model, scoring_state, progress, candidates, ratings, policy.look_ahead, chunk
            )
        chosen = policy.select(progress, candidates, ratings)
        positions = candidates.gather(1, chosen)
        if policy.token_blind:
            # The generator scores the chosen positions alone: no token is sampled in vain, and `append`
            # continues from what was scored last instead of computing it again.
            tokens, log_prob, _ = score_candidates(model, states[0], positions, content, uniform, None, chunk)
        else:
            # These very tokens decided where to go: to sample again would change the distribution.
            tokens, log_prob = tokens.gather(1, chosen), log_prob.gather(1, chosen)
        finite &= ~(log_prob.isnan().any() | ratings.isnan().any())
        progress.reveal(positions)
        # Reading the flag makes a GPU wait, so it is read there at the end only.
        if (finite.device.type == "cpu" or not progress.open) and not finite:
            raise ValueError(f"the model's logits are not finite, seen at step {progress.step - 1}")
        if progress.open:  # after the last reveal nothing is scored any more
            states = [each.append(s, positions, tokens) for each, s in zip(models, states, strict=True)]
        yield Step(progress.step - 1, progress.total, positions, tokens, log_prob)


# --- one step: what would be there, and how good is it? ---------------------------------------------------


def sampled(sampling: Sampling) -> Content:
    """Content of generation: a token sampled from the model for each candidate."""
    return lambda positions, log_p, uniform: draws.sample_tokens(draws.truncate(log_p, sampling), uniform)


def given(tokens: Tensor) -> Content:
    """Content of order extraction: the true tokens (B, N) of an image."""
    return lambda positions, log_p, uniform: tokens.gather(1, positions)


def no_content(positions: Tensor, log_p: Tensor, uniform: Tensor) -> Tensor:
    """For ratings that do not look at tokens."""
    return torch.zeros_like(positions)


def score_candidates(
    model: AnyOrderModel,
    state: Any,
    candidates: Tensor,
    content: Content,
    uniform: Tensor,
    rate: Callable[[Tensor, Tensor], Tensor] | None,
    chunk: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of candidates (B, M), their log-probabilities and ratings: three (B, M), chunk by chunk.

    `content` puts a token on each, with the help of `uniform` (B, N) in [0, 1), a number per position; `rate`
    is that of a policy, None rates by log-probability. The state is left as it is.
    """
    parts = []
    for positions in candidates.split(chunk or _chunk(model, candidates), dim=1):
        # On a GPU the kernel casts, so that no float32 logits exist.
        log_p = model.score(state, positions).log_softmax(-1, dtype=torch.float32)
        tokens = content(positions, log_p, uniform.gather(1, positions))
        log_prob = draws.token_likelihood(log_p, tokens)
        parts.append((tokens, log_prob, rate(rating_log_probs(state, log_p), tokens) if rate else log_prob))
    tokens, log_prob, ratings = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    return tokens, log_prob, ratings


def expected_information(
    model: AnyOrderModel,
    state: Any,
    progress: Progress,
    candidates: Tensor,
    ratings: Tensor,
    top: int,
    chunk: int | None,
) -> tuple[Tensor, Tensor]:
    """Rate the `top` best candidates anew, by how much is learnt about all other open positions at each.

    That is the fall in their summed entropy, in nats, when the most likely token is revealed there. Takes all
    open positions (B, M) and ratings (B, M) that are their entropies, of either sign; returns positions
    (B, min(top, M)) and new ratings of them.
    """
    listed = ratings.argsort(dim=1, descending=True, stable=True)[:, :top]
    positions, entropies = candidates.gather(1, listed), ratings.abs()
    if listed.shape[1] == 1:  # nothing to choose from
        return positions, ratings.gather(1, listed)
    before = entropies.sum(1, keepdim=True) - entropies.gather(1, listed)
    after = [_entropy_after(model, state, progress.revealed, p, chunk) for p in positions.split(1, dim=1)]
    return positions, before - torch.stack(after, dim=1)


def _entropy_after(
    model: AnyOrderModel, state: Any, revealed: Tensor, position: Tensor, chunk: int | None
) -> Tensor:
    """Summed entropy (B,) nats of what is open after the likeliest token is put on `position` (B, 1)."""
    fork = copy.deepcopy(state)  # `append` uses a state up
    log_p = model.score(fork, position).log_softmax(-1, dtype=torch.float32)
    fork = model.append(fork, position, rating_log_probs(fork, log_p).argmax(-1))
    others = (~revealed.scatter(1, position, True)).nonzero()[:, 1].view(len(position), -1)
    unused = torch.zeros_like(revealed, dtype=torch.float32)
    return -score_candidates(model, fork, others, no_content, unused, draws.entropy, chunk)[2].sum(1)


def _chunk(model: AnyOrderModel, positions: Tensor) -> int:
    """Candidates per image and call: B * chunk within `ROWS`, B * chunk * V within `LOGITS`."""
    rows = min(ROWS.get(positions.device.type, 2**12), LOGITS // model.vocab_size)
    return max(1, rows // len(positions))


# --- whole images -----------------------------------------------------------------------------------------


def trace(steps: Iterator[Step], known: tuple[Tensor, Tensor] | None = None) -> Trace:
    """Run the loop to its end and collect the image, its order and its log-probabilities."""
    parts = [(step.positions, step.tokens, step.log_prob) for step in list(steps)]
    if known is not None:
        parts.insert(0, (*known, torch.zeros_like(known[0], dtype=torch.float32)))
    order, tokens, log_prob = (torch.cat(column, dim=1) for column in zip(*parts, strict=True))
    return Trace(tokens=torch.zeros_like(tokens).scatter(1, order, tokens), order=order, log_prob=log_prob)


def sample(
    model: AnyOrderModel, order: Order, streams: Streams, **options: Unpack[GenerationOptions]
) -> Trace:
    """Sample images in a fixed, random or inferred order; arguments and errors as of `generate`."""
    return trace(generate(model, order, streams, **options))


def extract_orders(
    model: AnyOrderModel,
    tokens: Tensor,
    order: Order = "entropy",
    streams: Streams | None = None,
    **options: Unpack[GenerationOptions],
) -> Trace:
    """Recover the order in which the model itself would reveal each image (OAR v1, Sec. 3).

    Args:
        model: any-order model.
        tokens: (B, N) integers, raster order.
        order: where to go; "token_likelihood" is the paper's rule.
        streams: only needed for noise; seeds 0..B-1 by default.
        **options: see `GenerationOptions`.

    Returns:
        Trace: `order` as extracted and `log_prob` of the true tokens in it by `model`, whatever scores.

    Raises:
        ValueError: tokens of another length than the grid.
    """
    _check_length(tokens, options.get("grid") or model.grid)
    streams = streams or Streams(range(len(tokens)), tokens.device)
    return trace(generate(model, order, streams, targets=_integers(tokens, streams), **options))


def complete(
    model: AnyOrderModel,
    tokens: Tensor,
    known: Tensor,
    order: Order,
    streams: Streams,
    **options: Unpack[GenerationOptions],
) -> Trace:
    """Generate what is missing: in- and outpainting without retraining (OAR v2).

    Args:
        model: any-order model.
        tokens: (B, N) integers, raster order; what stands at unknown positions is ignored.
        known: (B, N) bool; rows may know different numbers of positions.
        order: where to go, for the open positions.
        streams: one random stream per image.
        **options: see `GenerationOptions`.

    Raises:
        ValueError: `known` of another shape than `tokens`, tokens of another length than the grid.
    """
    message = f"known must be bool of shape {tuple(tokens.shape)}, got {known.dtype} {tuple(known.shape)}"
    require(known.shape == tokens.shape and known.dtype == torch.bool, message)
    grid = options.get("grid") or model.grid
    _check_length(tokens, grid)
    tokens, known = _integers(tokens, streams), known.to(streams.device)
    # One policy for the whole batch, since orders of images belong to rows; its subsets follow below.
    policy, condition = make_policy(order, grid, streams), options.pop("condition", None)
    result = Trace(tokens.clone(), torch.empty_like(tokens), torch.zeros_like(tokens, dtype=torch.float32))
    counts = known.sum(1)
    # A batch advances all its rows by as many positions at each step, so rows run together only if they have
    # equally many to go. The streams of a row are its own: the grouping does not change what it gets.
    for count in counts.unique().tolist():
        rows = (counts == count).nonzero().squeeze(1)
        at = known[rows].nonzero(as_tuple=True)[1].reshape(len(rows), count)
        prefix = (at, tokens[rows].gather(1, at))
        options["condition"] = None if condition is None else condition.to(streams.device)[rows]
        some = streams.subset(rows.tolist())
        part = trace(generate(model, policy.subset(rows), some, known=prefix, **options), prefix)
        for name, values in vars(part).items():
            getattr(result, name)[rows] = values
    return result


def sample_coarse_to_fine(
    model: AnyOrderModel,
    order: Order,
    streams: Streams,
    factor: int = 2,
    **options: Unpack[GenerationOptions],
) -> Trace:
    """Sample on a grid `factor` times that of training: first every factor-th patch, then the others.

    The first ones are sampled on the grid of training, so that the image is laid out as it was learnt; then
    they are the known ones of the large grid (RandAR, arXiv 2412.01827, resolution extrapolation).

    Args:
        model: any-order model.
        order: name of an order or a `PolicyConfig`, on both grids.
        streams: one random stream per image.
        factor: >= 2.
        **options: see `GenerationOptions`; `grid` is the coarse one.

    Returns:
        Trace of the large grid; `log_prob` is zero for the patches that were sampled on the small one.
    """
    require(factor >= 2, f"factor must be >= 2, got {factor}: generate on the grid of training instead")
    coarse = options.get("grid") or model.grid
    fine = Grid(factor * coarse.h, factor * coarse.w)
    first = sample(model, order, streams, **options)
    options["grid"] = fine
    at = factor * torch.arange(coarse.n, device=first.tokens.device)
    there = at // (factor * coarse.w) * factor * fine.w + at % (factor * coarse.w)
    tokens = first.tokens.new_zeros(len(first.tokens), fine.n)
    known = torch.zeros_like(tokens, dtype=torch.bool)
    tokens[:, there], known[:, there] = first.tokens, True
    return complete(model, tokens, known, order, streams, **options)


def _integers(tokens: Tensor, streams: Streams) -> Tensor:
    return tokens.to(streams.device, torch.int64)


def _check_length(tokens: Tensor, grid: Grid) -> None:
    message = f"{tokens.shape[1]} tokens per image do not fill a {grid.h} x {grid.w} grid"
    require(tokens.shape[1] == grid.n, message)
