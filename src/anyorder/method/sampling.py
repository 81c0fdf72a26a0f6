"""From logits to tokens and ratings: truncated sampling, and confidence scores of positions."""

import copy
import math
from collections import abc
from dataclasses import dataclass

import torch
from torch import Tensor

from anyorder import families
from anyorder.contracts import exact, require


@dataclass(frozen=True)
class Sampling:
    """How a token is sampled from logits; the filters are applied in the order of the fields."""

    temperature: float = 1.0
    """Logits are divided by it: below 1 is more faithful and less diverse; 0 takes the most likely token."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches p."""
    min_p: float = 0.0
    """Keep tokens at least min_p times as likely as the most likely one."""

    def __post_init__(self) -> None:
        require(0 <= self.temperature < math.inf, f"temperature must be >= 0, got {self.temperature}")
        tiny = f"temperature must be 0, or at least 1e-6, got {self.temperature}: logits would overflow"
        require(not 0 < self.temperature < 1e-6, tiny)
        whole = hasattr(self.top_k, "__index__") and self.top_k >= 0
        require(whole, f"top_k must be >= 0 (0 keeps all), got {self.top_k}")
        require(0 < self.top_p <= 1, f"top_p must lie in (0, 1], got {self.top_p}")
        require(0 <= self.min_p < 1, f"min_p must lie in [0, 1), got {self.min_p}")
        filters = (self.top_k, self.top_p, self.min_p) != (0, 1, 0)
        text = "temperature=0 takes the most likely token: leave out top_k, top_p and min_p"
        require(self.temperature > 0 or not filters, text)


def truncate(logits: Tensor, sampling: Sampling) -> Tensor:
    """Temperature and truncation: logits (..., V), float32, -inf for tokens that cannot be sampled."""
    logits = logits.float()
    if sampling.temperature == 0:
        return logits.masked_fill(logits < logits.amax(-1, keepdim=True), -torch.inf)
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        kept = logits.topk(sampling.top_k, -1).indices
        logits = torch.full_like(logits, -torch.inf).scatter(-1, kept, logits.gather(-1, kept))
    if sampling.top_p < 1:
        ranked, index = logits.sort(-1, descending=True)
        p = ranked.softmax(-1)
        ranked = ranked.masked_fill(p.cumsum(-1) - p >= sampling.top_p, -torch.inf)
        logits = torch.empty_like(logits).scatter(-1, index, ranked)
    if sampling.min_p > 0:
        floor = logits.amax(-1, keepdim=True) + math.log(sampling.min_p)
        logits = logits.masked_fill(logits < floor, -torch.inf)
    return logits


def sample_tokens(logits: Tensor, uniform: Tensor) -> Tensor:
    """Tokens (...) int64 from logits (..., V) and `uniform` (...) in [0, 1), by inverting the cumulative sum.

    That takes one random number per token, rather than V.
    """
    # Integers add up exactly in any sequence; float sums waver on a GPU and would reach impossible tokens.
    cdf = (logits.float().softmax(-1) * 2**30).int().cumsum(-1, dtype=torch.int32)
    # Exact, and without float64, which Apple's GPUs lack: `uniform` is a whole number of 2**-24.
    target = ((uniform * 2**24).long() * cdf[..., -1] >> 24).int()
    # The clamp matters only for logits that are not finite: `generate` reports those.
    return torch.searchsorted(cdf, target[..., None], right=True).squeeze(-1).clamp_max(cdf.shape[-1] - 1)


class Streams:
    """The random numbers of images, as a pure function: nothing is stored, and nothing is used up.

    A number is a hash of the image's seed, its purpose, the step and the position. So an image depends
    neither on its neighbours nor on batch size, chunks, threads or device. The n-th number of a step is the
    n-th of a SplitMix64 generator (Steele et al., OOPSLA 2014) that begins at a hash of all the rest.
    """

    def __init__(self, seeds: abc.Sequence[int], device: torch.device | str = "cpu"):
        """Take one seed per image, any integers, of which the lowest 64 bits count."""
        signed = [(int(seed) + 2**63) % 2**64 - 2**63 for seed in seeds]
        self.keys = _mix(torch.tensor(signed, dtype=torch.int64).to(device) + _STEP)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def device(self) -> torch.device:
        """Where the numbers are made."""
        return self.keys.device

    def subset(self, rows: Tensor) -> "Streams":
        """Those of some images (R,) int64."""
        part = copy.copy(self)
        part.keys = self.keys[rows]
        return part

    def uniform(self, step: int | Tensor, positions: Tensor) -> Tensor:
        """For tokens: (B, M) float32 in (0, 1), at a step, one or (B,), and positions (B, M) or (M,)."""
        return _uniform(self._bits(0, step, positions))

    def gumbel(self, step: int | Tensor, positions: Tensor) -> Tensor:
        """For the choice of positions: standard Gumbel numbers (B, M) float32; arguments as of `uniform`."""
        # In float64, since the last bits of logarithms differ between devices; rounding hides them.
        uniform = exact(_uniform(self._bits(1, step, positions)))
        return uniform.log_().neg_().log_().neg_().float().to(self.device)

    def permutation(self, n: int) -> Tensor:
        """A uniformly random permutation of n positions, (B, n) int64."""
        return self._bits(2, 0, torch.arange(n, device=self.device)).argsort(1)

    def _bits(self, purpose: int, step: int | Tensor, index: Tensor) -> Tensor:
        """64 random bits each, (B, M) int64."""
        return _mix(_mix(self.keys + (4 * step + purpose))[:, None] + (index + 1) * _STEP)


_STEP, _FIRST, _SECOND = (n - 2**64 for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
"""The constants of SplitMix64, as int64."""


def _mix(x: Tensor) -> Tensor:
    """The hash of SplitMix64, in place, int64; products wrap around, alike on every device."""
    x.bitwise_xor_(_shifted(x, 30)).mul_(_FIRST)
    x.bitwise_xor_(_shifted(x, 27)).mul_(_SECOND)
    return x.bitwise_xor_(_shifted(x, 31))


def _shifted(x: Tensor, bits: int) -> Tensor:
    """To the right, filled with zeros, not with the sign."""
    return (x >> bits).bitwise_and_(2 ** (64 - bits) - 1)


def _uniform(bits: Tensor) -> Tensor:
    """The odd multiples of 2^-24, float32 without rounding: neither 0 nor 1."""
    return (_shifted(bits, 40).bitwise_or_(1)).float().mul_(2**-24)


# --- confidence scores ------------------------------------------------------------------------------------
# Each maps normalised log-probabilities (..., V) and tokens (...) to (...) nats; larger is more certain.


def token_likelihood(log_p: Tensor, tokens: Tensor) -> Tensor:
    """log p(token), the paper's score (OAR, arXiv 2504.17069 v1, Sec. 3); looks at the token."""
    return log_p.gather(-1, tokens[..., None]).squeeze(-1)


def max_prob(log_p: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of the most likely token."""
    return log_p.amax(-1)


def entropy(log_p: Tensor, tokens: Tensor) -> Tensor:
    """Negative entropy of the distribution: 0 is certain."""
    finite = log_p.clamp_min(torch.finfo(log_p.dtype).min)  # 0 log 0 = 0
    return finite.mul_(log_p.exp()).sum(-1)


def margin(log_p: Tensor, tokens: Tensor) -> Tensor:
    """Log-ratio of the two most likely tokens; infinite if only one is possible."""
    if log_p.shape[-1] == 1:
        return torch.full_like(log_p[..., 0], torch.inf)
    first, second = log_p.topk(2, -1).values.unbind(-1)
    return first - second


SCORES: dict[str, abc.Callable[[Tensor, Tensor], Tensor]] = {
    f.__name__: f for f in (token_likelihood, max_prob, entropy, margin)
}
TOKEN_BLIND = frozenset(SCORES) - {"token_likelihood"}
"""Scores that do not look at the sampled or given token."""


def score_of(name: str) -> tuple[abc.Callable[[Tensor, Tensor], Tensor], bool]:
    """The function of a score, and whether it is token-blind.

    An own score, see `families.resolve`, is a function of `log_p` alone, or of `log_p` and `tokens`.

    Raises:
        ValueError: no such score.
    """
    if name in SCORES:
        return SCORES[name], name in TOKEN_BLIND
    known = families.is_own("policies", name)
    require(known, f"unknown score '{name}': choose one of {', '.join(SCORES)}, or package.module:function")
    own = families.resolve("policies", name)
    names = families.parameters(own)
    text = f"a score is a function of (log_p) or (log_p, tokens), {name} is one of ({', '.join(names)})"
    require(names in (["log_p"], ["log_p", "tokens"]), text)
    return (own, False) if len(names) == 2 else (lambda log_p, tokens: own(log_p), True)
