"""The one loop: score open positions, put a token on each, reveal some, repeat.

Sampling in a given order, sampling with inferred locations, order extraction and completion are all
`generate` with another policy and another source of content (OAR, arXiv 2504.17069 v1, Sec. 3).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from anyorder.contracts import AnyOrderModel, Grid, OrderPolicy, Progress, Step, Trace
from anyorder.method.guidance import for_locations
from anyorder.method.policies import FixedOrder, InformativeOrder
from anyorder.method.policy_config import PolicyConfig, make_policy
from anyorder.method.sampling import Sampling, Streams, draw, entropy, token_likelihood, truncate

Content = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(positions (B, M), log-probabilities (B, M, V), uniform (B, M)) -> tokens (B, M)."""


def drawn(sampling: Sampling) -> Content:
    """Content of generation: a token drawn from the model for each candidate."""
    return lambda positions, log_p, uniform: draw(truncate(log_p, sampling), uniform)


def given(tokens: Tensor) -> Content:
    """Content of order extraction: the true tokens (B, N) of a training image."""
    return lambda positions, log_p, uniform: tokens.gather(1, positions)


def _blank(positions: Tensor, log_p: Tensor, uniform: Tensor) -> Tensor:
    """No content: for token-blind ratings."""
    return torch.zeros_like(positions)


@torch.no_grad()
def generate(
    model: AnyOrderModel,
    policy: OrderPolicy,
    content: Content,
    streams: Streams,
    *,
    condition: Tensor | None = None,
    grid: Grid | None = None,
    known: tuple[Tensor, Tensor] | None = None,
    scorer: AnyOrderModel | None = None,
    chunk: int | None = None,
) -> Iterator[Step]:
    """Reveal every open position, step by step; progress bars and animations read this stream.

    Costs per image, N positions: a fixed order and the location head evaluate N candidates; an inferred
    order N (N + 1) / (2 refresh), about the share `rescore` of it if it is lazy, and N of the drawer if it is
    decided before the tokens are drawn; expected information 1 + top times that. In S steps, N^2 / 2 becomes
    about N S / 2.
    Memory: the model's cache, O(depth * B * N * D), plus O(B * chunk * (D + V)), see `_chunk`.

    Args:
        model: any-order model, the drawer: it decides what.
        policy: where to go.
        content: what to put there.
        streams: one random stream per image; its length is the batch size B.
        condition: (B,) or (B, 1 + A + L) int64, see `contracts`, or None.
        grid: the grid to draw on; the model's own by default.
        known: positions (B, K) and tokens (B, K) that are given, revealed first.
        scorer: the model that decides where, if it is not the drawer itself: for a drawer that was
            fine-tuned on the scorer's orders. The drawer then evaluates the chosen positions only. A fixed
            order needs none, and leaves it unused.
        chunk: candidates scored per call; by default as many as keep memory within bounds, see `_chunk`.

    Yields:
        Step: after each reveal.

    Raises:
        ValueError: a scorer of its own with a policy that looks at the drawn tokens, or a policy that asks a
            location head of a model that has none.
    """
    if scorer is not None and not policy.token_blind:
        raise ValueError(
            f"'{policy.name}' looks at the drawer's tokens, so no other model can score: leave scorer out, "
            "or choose a token-blind order"
        )
    scorer = None if isinstance(policy, FixedOrder) else scorer
    if policy.located and not hasattr(scorer or model, "locate"):
        raise ValueError(f"'{policy.name}' asks a location head: this model has none, choose another order")
    grid = grid or model.grid
    device = streams.device
    batch = len(streams)
    state = model.start(batch, condition, grid)
    guide = scorer.start(batch, condition, grid) if scorer is not None else None
    progress = _nothing_revealed(grid, batch, device)
    if known is not None and known[0].shape[1]:
        state = model.append(state, *known)
        guide = scorer.append(guide, *known) if scorer is not None else None
        progress.revealed.scatter_(1, known[0], True)
        progress.last = known[0][:, -1]
    total = progress.total = int((~progress.revealed[0]).sum())
    done = 0
    while done < total:
        uniform, progress.noise = streams.uniform(grid.n), streams.gumbel(grid.n)
        by, its = (model, state) if scorer is None else (scorer, guide)
        positions, peeked = _where(by, its, policy, content, progress, uniform, chunk)
        written = []
        for some in positions.split(1 if policy.sequential else positions.shape[1], dim=1):
            tokens, log_prob = peeked or _look(model, state, policy, content, some, uniform, chunk)[:2]
            done += some.shape[1]
            if done < total:  # after the last reveal nothing is scored any more
                state = model.append(state, some, tokens)
            written.append(tokens)
            progress.revealed.scatter_(1, some, True)
            progress.revealed_at.scatter_(1, some, progress.step)
            progress.last = some[:, -1]
            progress.step += 1
            yield Step(progress.step - 1, total, some, tokens, log_prob)
        if scorer is not None and done < total:
            guide = scorer.append(guide, positions, torch.cat(written, dim=1))


def _nothing_revealed(grid: Grid, batch: int, device: torch.device | str) -> Progress:
    """Where the loop is before anything is given or drawn."""
    never = torch.full((batch, grid.n), -1, device=device)
    return Progress(
        grid=grid,
        revealed=torch.zeros(batch, grid.n, dtype=torch.bool, device=device),
        last=never[:, 0].clone(),
        step=0,
        total=grid.n,
        noise=torch.zeros(batch, grid.n, device=device),
        ratings=torch.zeros(batch, grid.n, device=device),
        rated_at=never,
        revealed_at=never.clone(),
    )


def _where(
    by: AnyOrderModel,
    state: Any,
    policy: OrderPolicy,
    content: Content,
    progress: Progress,
    uniform: Tensor,
    chunk: int | None,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Positions (B, K) to reveal now; if the policy peeked, their tokens and log-probabilities, too."""
    if policy.located:
        progress.where = by.locate(state, progress.revealed)  # type: ignore[attr-defined]
    if isinstance(policy, InformativeOrder):
        progress.uncertainty_after = partial(_uncertainty_after, by, state, progress, chunk)
    candidates = policy.propose(progress)
    if not policy.rated:
        ratings = torch.zeros(candidates.shape, device=candidates.device)
        return candidates.gather(1, policy.select(progress, candidates, ratings)), None
    what = _blank if policy.token_blind else content
    tokens, log_prob, ratings = _look(by, state, policy, what, candidates, uniform, chunk)
    progress.ratings.scatter_(1, candidates, ratings)
    progress.rated_at.scatter_(1, candidates, progress.step)
    chosen = policy.select(progress, candidates, ratings)
    peeked = None if policy.token_blind else (tokens.gather(1, chosen), log_prob.gather(1, chosen))
    return candidates.gather(1, chosen), peeked


def _uncertainty_after(
    model: AnyOrderModel, state: Any, progress: Progress, chunk: int | None, position: Tensor
) -> Tensor:
    """Summed entropy (B,) nats of the open positions after the likeliest token is put on `position` (B,)."""
    fork, position = copy.deepcopy(state), position[:, None]
    token = for_locations(fork, _log_p(model, fork, position)).argmax(-1)
    fork = model.append(fork, position, token)
    others = (~progress.revealed.scatter(1, position, True)).nonzero()[:, 1].view(len(position), -1)
    total = torch.zeros(len(position), device=position.device)
    for some in others.split(chunk or _chunk(model, others), dim=1):
        total -= entropy(for_locations(fork, _log_p(model, fork, some)), some).sum(1)
    return total


def _look(
    model: AnyOrderModel,
    state: object,
    policy: OrderPolicy,
    content: Content,
    candidates: Tensor,
    uniform: Tensor,
    chunk: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What would be there, how likely, and how much it is wanted: three (B, M), chunk by chunk."""
    parts = []
    for positions in candidates.split(chunk or _chunk(model, candidates), dim=1):
        log_p = _log_p(model, state, positions)
        tokens = content(positions, log_p, uniform.gather(1, positions))
        parts.append(
            (tokens, token_likelihood(log_p, tokens), policy.rate(for_locations(state, log_p), tokens))
        )
    tokens, log_prob, ratings = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    return tokens, log_prob, ratings


def _log_p(model: AnyOrderModel, state: Any, positions: Tensor) -> Tensor:
    """Log-probabilities (B, M, V) float32; on a GPU the kernel casts, so that no float32 logits exist."""
    return model.score(state, positions).log_softmax(-1, dtype=torch.float32)


ROWS = {"cpu": 2**10, "cuda": 2**14}
"""Candidates of all images together that are scored at once: enough to keep the device busy. On a CPU, where
more fall out of its cache, 512 to 2048 were measured to be equally fast, 256 slower."""
LOGITS = 2**26
"""Logits held at once, 256 MiB in float32: fewer candidates where the codebook is large."""


def _chunk(model: AnyOrderModel, positions: Tensor) -> int:
    """Candidates per image and call: B * chunk within `ROWS`, B * chunk * V within `LOGITS`."""
    rows = min(ROWS.get(positions.device.type, 2**12), LOGITS // model.vocab_size)
    return max(1, rows // len(positions))


def trace(steps: Iterator[Step], known: tuple[Tensor, Tensor] | None = None) -> Trace:
    """Run the loop to its end and collect the image, its order and its log-probabilities."""
    parts = [(step.positions, step.tokens, step.log_prob) for step in steps]
    if known is not None:
        parts.insert(0, (*known, torch.zeros(known[0].shape, device=known[0].device)))
    order, tokens, log_prob = (torch.cat(column, dim=1) for column in zip(*parts, strict=True))
    return Trace(tokens=torch.zeros_like(tokens).scatter(1, order, tokens), order=order, log_prob=log_prob)


def sample(
    model: AnyOrderModel,
    order: str | Tensor | OrderPolicy | PolicyConfig,
    streams: Streams,
    *,
    condition: Tensor | None = None,
    grid: Grid | None = None,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    scorer: AnyOrderModel | None = None,
    chunk: int | None = None,
) -> Trace:
    """Draw images in a fixed, random or inferred order.

    Args:
        model: any-order model, possibly `Guided`.
        order: what `make_policy` takes.
        streams: one random stream per image.
        condition: (B,) or (B, 1 + A + L) int64, see `contracts`, or None.
        grid: the grid to draw on.
        sampling: temperature and truncation.
        scorer: see `generate`.
        chunk: see `generate`.
    """
    policy = make_policy(order, grid or model.grid, streams)
    return trace(
        generate(
            model,
            policy,
            drawn(sampling),
            streams,
            condition=condition,
            grid=grid,
            scorer=scorer,
            chunk=chunk,
        )
    )


def extract_orders(
    model: AnyOrderModel,
    tokens: Tensor,
    order: str | OrderPolicy = "entropy",
    streams: Streams | None = None,
    *,
    condition: Tensor | None = None,
    grid: Grid | None = None,
    scorer: AnyOrderModel | None = None,
    chunk: int | None = None,
) -> Trace:
    """Recover the order in which the model itself would reveal each image (OAR v1, Sec. 3).

    Args:
        model: any-order model.
        tokens: (B, N) int64, raster order.
        order: an inferred-order policy or the name of a score. "token_likelihood" is the paper's rule.
        streams: only needed for a location temperature; seeds 0..B-1 by default.
        condition: (B,) or (B, 1 + A + L) int64, see `contracts`, or None.
        grid: the grid of `tokens`.
        scorer: see `generate`; `log_prob` is still that of `model`.
        chunk: see `generate`.

    Returns:
        Trace: `order` as extracted and `log_prob` of the true tokens in it.

    Raises:
        ValueError: tokens of another length than the grid.
    """
    grid = grid or model.grid
    _check_length(tokens, grid)
    streams = streams or Streams(range(len(tokens)), tokens.device)
    policy = make_policy(order, grid, streams)
    steps = generate(
        model, policy, given(tokens), streams, condition=condition, grid=grid, scorer=scorer, chunk=chunk
    )
    return trace(steps)


def _check_length(tokens: Tensor, grid: Grid) -> None:
    if tokens.shape[1] != grid.n:
        raise ValueError(f"{tokens.shape[1]} tokens per image do not fill a {grid.h} x {grid.w} grid")


def complete(
    model: AnyOrderModel,
    tokens: Tensor,
    known: Tensor,
    order: str | Tensor | OrderPolicy | PolicyConfig,
    streams: Streams,
    *,
    condition: Tensor | None = None,
    grid: Grid | None = None,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    scorer: AnyOrderModel | None = None,
    chunk: int | None = None,
) -> Trace:
    """Draw what is missing: in- and outpainting without retraining (OAR v2).

    Args:
        model: any-order model.
        tokens: (B, N) int64, raster order; what stands at unknown positions is ignored.
        known: (B, N) bool; rows may know different numbers of positions.
        order: what `make_policy` takes, for the open positions.
        streams: one random stream per image.
        condition: (B,) or (B, 1 + A + L) int64, see `contracts`, or None.
        grid: the grid of `tokens`.
        sampling: temperature and truncation.
        scorer: see `generate`.
        chunk: see `generate`.

    Raises:
        ValueError: `known` of another shape than `tokens`, or tokens of another length than the grid.
    """
    if known.shape != tokens.shape or known.dtype != torch.bool:
        raise ValueError(
            f"known must be bool of shape {tuple(tokens.shape)}, got {known.dtype} {tuple(known.shape)}"
        )
    grid = grid or model.grid
    _check_length(tokens, grid)
    counts = known.sum(1)
    result = Trace(tokens.clone(), torch.empty_like(tokens), torch.zeros(tokens.shape, device=tokens.device))
    for count in counts.unique().tolist():  # rows that know equally many positions run as one batch
        rows = (counts == count).nonzero().squeeze(1)
        here = known[rows].nonzero(as_tuple=True)[1].reshape(len(rows), count)
        prefix = (here, tokens[rows].gather(1, here))
        some = streams.subset(rows.tolist())
        own = order[rows] if isinstance(order, Tensor) and order.ndim == 2 else order
        own = own.of(rows) if isinstance(own, FixedOrder) else own
        steps = generate(
            model,
            make_policy(own, grid, some),
            drawn(sampling),
            some,
            condition=None if condition is None else condition[rows],
            grid=grid,
            known=prefix,
            scorer=scorer,
            chunk=chunk,
        )
        part = trace(steps, prefix)
        result.tokens[rows], result.order[rows], result.log_prob[rows] = (
            part.tokens,
            part.order,
            part.log_prob,
        )
    return result


def sample_coarse_to_fine(
    model: AnyOrderModel,
    order: str | PolicyConfig,
    streams: Streams,
    factor: int = 2,
    *,
    condition: Tensor | None = None,
    sampling: Sampling = Sampling(),  # noqa: B008 - frozen
    scorer: AnyOrderModel | None = None,
    chunk: int | None = None,
) -> Trace:
    """Draw on a grid `factor` times that of training: first every factor-th patch, then the others.

    The first ones are drawn on the grid of training, so that the whole picture is laid out as it was learnt;
    then they are the known ones of the large grid (RandAR, arXiv 2412.01827, resolution extrapolation).

    Args:
        model: any-order model.
        order: name of an order or a `PolicyConfig`, on both grids.
        streams: one random stream per image.
        factor: >= 2.
        condition: (B,) int64 class labels, or None.
        sampling: temperature and truncation.
        scorer: see `generate`.
        chunk: see `generate`.

    Returns:
        Trace of the large grid; `log_prob` is zero for the patches that were drawn on the small one.

    Raises:
        ValueError: a factor below 2.
    """
    if factor < 2:
        raise ValueError(f"factor must be >= 2, got {factor}: draw on the grid of training instead")
    coarse, fine = model.grid, Grid(factor * model.grid.h, factor * model.grid.w)
    first = sample(model, order, streams, condition=condition, sampling=sampling, scorer=scorer, chunk=chunk)
    at = factor * torch.arange(coarse.n, device=first.tokens.device)
    there = at // (factor * coarse.w) * factor * fine.w + at % (factor * coarse.w)
    tokens = first.tokens.new_zeros(len(first.tokens), fine.n)
    known = torch.zeros_like(tokens, dtype=torch.bool)
    tokens[:, there], known[:, there] = first.tokens, True
    return complete(
        model,
        tokens,
        known,
        order,
        streams,
        condition=condition,
        grid=fine,
        sampling=sampling,
        scorer=scorer,
        chunk=chunk,
    )
