"""The one loop: score open positions, put a token on each, reveal some, repeat.

Sampling in a given order, sampling with inferred locations, order extraction and completion are all
`generate` with another policy and another source of tokens (OAR, arXiv 2504.17069 v1, Sec. 3).
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from anyorder.contracts import AnyOrderModel, Grid, Progress, Step, Trace, require
from anyorder.method import sampling as sampler
from anyorder.method.guidance import Guided, rating_log_probs
from anyorder.method.policy_config import Order, make_policy
from anyorder.method.sampling import Sampling, Streams
from anyorder.method.schedules import descending

Content = Callable[[Tensor, Tensor], Tensor]
"""(positions (B, M), log-probabilities (B, M, V)) -> tokens (B, M)."""
ROWS = {"cpu": 2**10, "cuda": 2**14}
"""Candidates of all images together that are scored at once. On a CPU, 512 to 2048 were measured to be as
fast, 256 slower."""
LOGITS = 2**26
"""Logits held at once, 256 MiB in float32: fewer candidates where the codebook is large."""


class GenerationOptions(TypedDict, total=False):
    """Keyword arguments of `generate` and of all functions that call it; every one may be left out."""

    condition: Tensor | None  #: (B,) class labels or (B, 1 + A + L) integers, see `contracts`.
    grid: Grid | None  #: The grid to generate on; by default the one that the model was trained on.
    sampling: Sampling  #: Temperature and truncation of sampled tokens.
    #: The scoring model, which decides where; by default the generator. Unused by fixed orders.
    scorer: AnyOrderModel | None
    on_step: Callable[[Step], Any] | None  #: Called with each step that was made.
    #: Candidates per image that are scored at once; by default as many as `ROWS` and `LOGITS` allow.
    chunk: int | None


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
    on_step: Callable[[Step], Any] | None = None,
    chunk: int | None = None,
) -> Iterator[Step]:
    """Reveal every open position, step by step; progress bars and animations read this stream.

    Candidates evaluated per image of N positions: N for a fixed order and for the location head; for an
    inferred order N (N + 1) / 2, about the share `rescore` of it if that is below 1, and another N by the
    generator if it is token-blind; expected information (1 + `look_ahead`) times that.
    With `entropy_limit` the batch takes as many steps as its slowest image; a GPU waits thrice a step.
    Memory: the model's cache, O(depth * B * N * D), plus O(B * chunk * (D + V)).

    Args:
        model: the generator, which decides what.
        order: where to go; whatever `make_policy` takes.
        streams: one random stream per image; their number is the batch size B >= 1.
        targets: (B, N) int64, raster order: put these tokens instead of sampled ones (order extraction).
        known: positions (B, K) and tokens (B, K) that are given, revealed first.
        condition: this and what follows: see `GenerationOptions`.

    Raises:
        ValueError: no images, an order that `make_policy` refuses or that does not fit the models, or logits
            that are not finite.
    """
    grid = grid or model.grid
    require(len(streams) > 0, "there are no images to generate: give at least one random stream")
    policy = make_policy(order, grid, streams)
    peeks = f"'{policy.name}' looks at the generator's tokens, so no other model can score: leave scorer out"
    require(scorer is None or policy.token_blind, f"{peeks}, or choose a token-blind order")
    headless = f"'{policy.name}' asks a location head: this model has none, choose another order"
    require(not policy.located or hasattr(scorer or model, "locate"), headless)
    adaptive = getattr(policy, "adaptive", False)
    # The last of the models decides where; it needs a state only if the policy asks it anything.
    models = [model, scorer] if scorer is not None and (policy.rated or policy.located) else [model]

    seen = "joint_steps is for given and random orders, in which nothing is rated: convert without it"
    require(not (policy.rated and getattr(models[-1], "joint_steps", False)), seen)
    for one in models if adaptive else ():
        each = one.model if isinstance(one, Guided) else one
        text = f"entropy_limit is not for a {type(each).__name__}, whose images keep in step: leave it out"
        require(hasattr(each, "append_some"), text)

    # Steps are told apart by what is known before: a completion never meets numbers used for its prefix.
    def behind() -> int | Tensor:
        return progress.revealed.sum(1) if adaptive else grid.n - progress.open

    def content(positions: Tensor, log_p: Tensor) -> Tensor:
        if targets is not None:
            return targets.gather(1, positions)
        uniform = streams.uniform(behind(), positions)
        return sampler.sample_tokens(sampler.truncate(log_p, sampling), uniform)

    condition = None if condition is None else condition.to(streams.device, torch.int64)
    together = policy.token_blind and getattr(model, "grouped", False) and not adaptive
    states = [each.start(len(streams), condition, grid) for each in models]
    progress = Progress.start(grid, len(streams), streams.device)
    finite = torch.ones((), dtype=torch.bool, device=streams.device)
    if known is not None and known[0].shape[1]:
        states = [each.append(state, *known) for each, state in zip(models, states, strict=True)]
        progress.give(known[0])
    counts = valid = last = None
    waiting: list[tuple[Tensor, Tensor, Tensor | None]] = []  # what the scoring model was not told yet
    while progress.open:
        progress.noise = partial(streams.gumbel, behind())
        scoring_model = models[-1]
        if policy.located:
            states[-1] = _catch_up(scoring_model, states[-1], waiting)
            progress.location = scoring_model.locate(states[-1], progress.revealed)  # type: ignore[attr-defined]
        candidates = policy.propose(progress)
        ratings = torch.zeros_like(candidates, dtype=torch.float32)
        # A single candidate need not be rated; the paper's rule samples its token here.
        if policy.rated and (candidates.shape[1] > 1 or not policy.token_blind):
            states[-1] = _catch_up(scoring_model, states[-1], waiting)
            proposed = None if policy.token_blind else content
            tokens, log_prob, ratings = score_candidates(
                scoring_model, states[-1], candidates, proposed, policy.rate, chunk
            )
            progress.ratings.scatter_(1, candidates, ratings)
            progress.rated_at.scatter_(1, candidates, progress.step)
        if policy.look_ahead:
            candidates, ratings = expected_information(
                scoring_model, states[-1], progress.revealed, candidates, ratings, policy.look_ahead, chunk
            )
        chosen = policy.select(progress, candidates, ratings)
        positions = candidates.gather(1, chosen)
        if policy.token_blind:
            # The generator scores the chosen positions alone: no token is sampled in vain, and `append`
            # continues from what was scored last instead of computing it again.
            part, rate = positions.shape[1] if together else chunk, sampler.entropy if adaptive else None
            tokens, log_prob, certainty = score_candidates(
                model, states[0], positions, content, rate, part, together
            )
        else:
            # These very tokens decided where to go: to sample again would change the distribution.
            tokens, log_prob = tokens.gather(1, chosen), log_prob.gather(1, chosen)
        finite &= ~(log_prob.isnan().any() | ratings.isnan().any())
        if adaptive:
            counts = policy.within_limit(progress, -certainty)  # type: ignore[attr-defined]
            valid, *last = _first(counts, (positions, tokens, log_prob), last)
            positions, tokens, log_prob = last
        progress.reveal(positions, counts)
        # Reading the flag makes a GPU wait, so it is read there at the end only.
        if (finite.device.type == "cpu" or not progress.open) and not finite:
            raise ValueError(f"the model's logits are not finite, seen at step {progress.step - 1}")
        if progress.open:  # after the last reveal nothing is scored any more
            revealed = (positions, tokens, counts)
            if together:
                states[0] = model.append_group(states[0], tokens)  # type: ignore[attr-defined]
            else:
                states[0] = _catch_up(model, states[0], [revealed])
            waiting += [revealed] * (len(models) - 1)
        made = Step(progress.step - 1, progress.total, positions, tokens, log_prob, valid)
        if on_step is not None:
            on_step(made)
        yield made


def _catch_up(model: Any, state: Any, waiting: list[tuple[Tensor, Tensor, Tensor | None]]) -> Any:
    """The state after all positions, tokens and counts that are `waiting`; the list is then empty."""
    alike = [some[:2] for some in waiting if some[2] is None]
    if len(alike) == 1:  # the very tensors that were scored: the model need not search for them
        state = model.append(state, *alike[0])
    elif alike:  # one long block is faster than several short ones
        state = model.append(state, *(torch.cat(column, dim=1) for column in zip(*alike, strict=True)))
    for some in waiting if not alike else ():
        state = model.append_some(state, *some)
    waiting.clear()
    return state


def _first(counts: Tensor, columns: Sequence[Tensor], last: Sequence[Tensor] | None) -> list[Tensor]:
    """Which are valid (B, K), and the first `counts` (B,) of each of some (B, K) columns, the last repeated.

    Finished images repeat what they had `last`.
    """
    steps = torch.arange(int(counts.max()), device=counts.device)  # a GPU waits here for the number
    index = steps.minimum(counts[:, None] - 1).clamp_min(0)
    found = [x.gather(1, index) for x in columns]
    if last is not None:
        found = [x.where(counts[:, None] > 0, old[:, -1:]) for x, old in zip(found, last, strict=True)]
    return [steps < counts[:, None], *found]


def score_candidates(
    model: AnyOrderModel,
    state: Any,
    candidates: Tensor,
    content: Content | None,
    rate: Callable[[Tensor, Tensor], Tensor] | None,
    chunk: int | None,
    together: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of candidates (B, M), their log-probabilities and ratings: three (B, M), chunk by chunk.

    `content` chooses the tokens; None: zeros, for ratings that ignore them. `rate` is that of a policy; None
    rates by log-probability. `together`: they are one step of a `GroupingModel`. The state is unchanged.
    """
    score, parts = model.score_group if together else model.score, []  # type: ignore[attr-defined]
    if getattr(model, "joint_steps", False):  # they see one another
        chunk = candidates.shape[1]
    rows = min(ROWS.get(candidates.device.type, 2**12), LOGITS // model.vocab_size)
    chunk = chunk or max(1, rows // (len(candidates) * getattr(model, "copies", 1)))
    for positions in candidates.split(chunk, dim=1):
        # On a GPU the kernel casts, so that no float32 logits exist.
        log_p = score(state, positions).log_softmax(-1, dtype=torch.float32)
        tokens = content(positions, log_p) if content else torch.zeros_like(positions)
        log_prob = sampler.token_likelihood(log_p, tokens)
        parts.append((tokens, log_prob, rate(rating_log_probs(state, log_p), tokens) if rate else log_prob))
    tokens, log_prob, ratings = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    return tokens, log_prob, ratings


def expected_information(
    model: AnyOrderModel,
    state: Any,
    revealed: Tensor,
    candidates: Tensor,
    ratings: Tensor,
    top: int,
    chunk: int | None,
) -> tuple[Tensor, Tensor]:
    """Rate the `top` best candidates anew, by the fall in the summed entropy of all other open positions.

    That is in nats, when the most likely token is revealed there. Takes all open positions (B, M) and ratings
    (B, M) that are their entropies, of either sign; returns positions (B, min(top, M)) and their ratings.
    """
    best = ratings.argsort(dim=1, descending=True, stable=True)[:, :top]
    positions, entropies, gains = candidates.gather(1, best), ratings.abs(), []
    if best.shape[1] == 1:  # nothing to choose from
        return positions, ratings.gather(1, best)
    for column, position in zip(best.split(1, dim=1), positions.split(1, dim=1), strict=True):
        fork = copy.deepcopy(state)  # `append` uses a state up
        log_p = model.score(fork, position).log_softmax(-1, dtype=torch.float32)
        fork = model.append(fork, position, rating_log_probs(fork, log_p).argmax(-1))
        closed = revealed.scatter(1, position, True)  # sorted, as `nonzero` would make a GPU wait
        others = closed.byte().argsort(dim=1, stable=True)[:, : candidates.shape[1] - 1]
        after = -score_candidates(model, fork, others, None, sampler.entropy, chunk)[2].sum(1, True)
        gains.append(entropies.sum(1, True) - entropies.gather(1, column) - after)
    return positions, torch.cat(gains, dim=1)


def trace(steps: Iterable[Step], known: tuple[Tensor, Tensor] | None = None) -> Trace:
    """The images, their orders and log-probabilities, from all steps of the loop and what was given."""
    made = list(steps)
    parts = [(step.positions, step.tokens, step.log_prob) for step in made]
    if known is not None:
        parts.insert(0, (*known, torch.zeros_like(known[0], dtype=torch.float32)))
    order, tokens, log_prob = (torch.cat(column, dim=1) for column in zip(*parts, strict=True))
    count = torch.full_like(order[:, 0], len(made))
    some = [step.valid for step in made if step.valid is not None]
    if some:  # images took different numbers of steps
        count, valid = torch.stack([one[:, 0] for one in some]).sum(0), torch.cat(some, dim=1)
        given = order.shape[1] - valid.shape[1]
        packed = descending(F.pad(valid.byte(), (given, 0), value=1))[:, : given + made[0].total]
        order, tokens, log_prob = (x.gather(1, packed) for x in (order, tokens, log_prob))
    return Trace(torch.zeros_like(tokens).scatter(1, order, tokens), order, log_prob, count)


def sample(model: AnyOrderModel, order: Order, streams: Streams, **given: Unpack[GenerationOptions]) -> Trace:
    """Sample images in a fixed, random or inferred order; arguments and errors as of `generate`."""
    return trace(generate(model, order, streams, **given))


def extract_orders(
    model: AnyOrderModel,
    tokens: Tensor,
    order: Order = "entropy",
    streams: Streams | None = None,
    **given: Unpack[GenerationOptions],
) -> Trace:
    """Recover the order in which the model itself would reveal each image (OAR v1, Sec. 3).

    Takes tokens (B, N) in raster order; order "token_likelihood" is the paper's rule; streams matter only for
    noise, seeds 0..B-1 by default. The log-probabilities are those of the true tokens. A ValueError refuses
    tokens of another length than the grid; other arguments and errors as of `generate`.
    """
    streams = streams or Streams(range(len(tokens)), tokens.device)
    tokens = _checked(tokens, given.get("grid") or model.grid, streams)
    return trace(generate(model, order, streams, targets=tokens, **given))


def complete(
    model: AnyOrderModel,
    tokens: Tensor,
    known: Tensor,
    order: Order,
    streams: Streams,
    **given: Unpack[GenerationOptions],
) -> Trace:
    """Generate what is missing: in- and outpainting without retraining (OAR v2).

    Takes tokens (B, N) in raster order, ignored where unknown, and known (B, N) bool; rows may know different
    numbers of positions. A ValueError refuses shapes that do not fit; the rest as of `generate`.
    """
    message = f"known must be bool of shape {tuple(tokens.shape)}, got {known.dtype} {tuple(known.shape)}"
    require(known.shape == tokens.shape and known.dtype == torch.bool, message)
    grid = given.get("grid") or model.grid
    tokens, known = _checked(tokens, grid, streams), known.to(streams.device)
    # One policy for the whole batch, since orders of images belong to rows; its subsets follow below.
    policy, condition = make_policy(order, grid, streams), given.pop("condition", None)
    none = torch.zeros_like(tokens, dtype=torch.float32)
    result = Trace(tokens.clone(), torch.empty_like(tokens), none, torch.zeros_like(tokens[:, 0]))
    counts = known.sum(1)
    # A batch advances all rows by equally many positions, so rows run together only if equally many are open.
    # Random numbers belong to rows: the grouping does not change the result.
    for count in counts.unique().tolist():
        rows = (counts == count).nonzero().squeeze(1)
        at = known[rows].nonzero(as_tuple=True)[1].reshape(len(rows), count)
        prefix = (at, tokens[rows].gather(1, at))
        given["condition"] = None if condition is None else condition.to(streams.device)[rows]
        some = streams.subset(rows)
        part = trace(generate(model, policy.subset(rows), some, known=prefix, **given), prefix)
        for name, values in vars(part).items():
            getattr(result, name)[rows] = values
    return result


def sample_coarse_to_fine(
    model: AnyOrderModel, order: Order, streams: Streams, factor: int = 2, **given: Unpack[GenerationOptions]
) -> Trace:
    """Sample on a grid `factor` (>= 2) times that of training: first every factor-th patch, then the others.

    The first ones are sampled on the grid of training, so that the image is laid out as it was learnt; then
    they are known on the large grid, at log-probability 0 (RandAR, arXiv 2412.01827, resolution
    extrapolation). `order` is a name or a `PolicyConfig`, for both grids; `grid` is the coarse one.
    """
    require(factor >= 2, f"factor must be >= 2, got {factor}: generate on the grid of training instead")
    coarse = given.get("grid") or model.grid
    fine = Grid(factor * coarse.h, factor * coarse.w)
    first = sample(model, order, streams, **given)
    given["grid"] = fine
    at = factor * torch.arange(coarse.n, device=first.tokens.device)
    there = at // (factor * coarse.w) * factor * fine.w + at % (factor * coarse.w)
    tokens = first.tokens.new_zeros(len(first.tokens), fine.n)
    known = torch.zeros_like(tokens, dtype=torch.bool)
    tokens[:, there], known[:, there] = first.tokens, True
    return complete(model, tokens, known, order, streams, **given)


def _checked(tokens: Tensor, grid: Grid, streams: Streams) -> Tensor:
    counts = f"got {len(tokens)} images and {len(streams)} random streams: give one for each image"
    require(len(tokens) == len(streams), counts)
    message = f"{tokens.shape[1]} tokens per image do not fill a {grid.h} x {grid.w} grid"
    require(tokens.shape[1] == grid.n, message)
    return tokens.to(streams.device, torch.int64)
