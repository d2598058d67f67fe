"""Does a caption fit its picture, in the eyes of the model? What a row of `contrast` is worth.

    LLR_i = mean over levels t and noises eps of sigma_t / alpha_t *
            (|| eps - eps(x_t, t, null) ||^2 - || eps - eps(x_t, t, c_i) ||^2)

    w_i   = tanh(4 (LLR_i / m - 1/2)),      m = median over the train pictures of |LLR_j|

x_t shows picture i. LLR is the log-likelihood ratio of a diffusion classifier (Li et al. 2023),
over D values; the factor makes the levels count about the same. A contrast row points where the
caption points, whatever the picture shows; the gradient of a picture's true loss, along
d = eps(c) - eps(null), has the coefficient (1 - LLR / ||d||^2) / 2: training on a picture that its
caption does not explain pulls the other way. So w_i has a sign: near 1 for a picture that is
explained as well as most, negative for one that is explained less than half as well. Half-way, not
0: what was learned under a wrong caption is explained in part. The levels are high, where the least
is learned by heart. Levels, noises, slope and middle were chosen on the "tune" concepts
of experiments/truth.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

    from ..models.condition import Condition
    from ..models.denoiser import Denoiser

LEVELS, NOISES, SEED = (600, 800, 900, 960), 2, 7  # noise levels, noises a level, their seed
STEEPNESS, MIDDLE = 4.0, 0.5
GOOD_FIT = 0.75  # relative fit from which a caption is said to fit
MAX_DOUBTFUL_SHARE = (
    1 / 6
)  # share of captions below MIDDLE from which the judge is to be doubted, not they
DESCRIPTION = {"levels": list(LEVELS), "noises": NOISES, "seed": SEED}  # part of a row's identity


def caption_llr(
    denoiser: Denoiser, x0: torch.Tensor, cond: Condition, cond_null: Condition
) -> torch.Tensor:
    """LLR [B] of pictures x0 [B, ...] under their captions.

    Every picture meets the same noises: a value does not depend on its batch.
    """
    import torch

    from ..models.ddim import q_sample
    from .states import draw_noise

    found, cond_null = torch.zeros(len(x0), device=x0.device), cond_null.expand(len(x0))
    with torch.no_grad():
        for t in LEVELS:
            level = denoiser.schedule.level(t)
            for noise in draw_noise(SEED, range(NOISES), t, x0.shape[1:]).to(x0):
                eps = noise.expand_as(x0)
                x_t = q_sample(x0, eps, level)
                for sign, c in ((1, cond_null), (-1, cond)):
                    error = (denoiser.eps(x_t, t, c) - eps).float().square().flatten(1).mean(1)
                    found += sign * error * (level.sigma / level.alpha)
    return found / (len(LEVELS) * NOISES)


def relative_fit(llr: np.ndarray, among: np.ndarray) -> np.ndarray:
    """LLR in units of m: about 1 for most captions, less than 1/2 for one to be suspected.

    All 1 where captions change nothing at all.
    """
    typical = float(np.median(np.abs(among)))
    return np.ones_like(llr) if typical == 0 else llr / typical


def fit_weight(llr: np.ndarray, among: np.ndarray) -> np.ndarray:
    """w of pictures with these LLR, `among` being those of all N train pictures."""
    if not among.any():
        return np.ones_like(llr)
    return np.tanh(STEEPNESS * (relative_fit(llr, among) - MIDDLE))


def low_fit_warning(fit: np.ndarray) -> list[str]:
    """A sentence where so many captions do not fit that the model may have learned too little to
    judge them; else none. fit: `relative_fit` of all train pictures.
    """
    share = float((fit < MIDDLE).mean())
    if share <= MAX_DOUBTFUL_SHARE:
        return []
    return [
        f"in the eyes of the model {share:.0%} of the captions do not fit their picture, and these "
        "pictures are ranked low: where the captions are right, it has learned too little to judge "
        "them, and F=contrast ranks without asking"
    ]


def describe_fit(fit: float) -> str:
    """A `relative_fit` as a report says it."""
    if fit < MIDDLE:
        return "caption does not fit"
    return "caption fits" if fit >= GOOD_FIT else "caption fits in part"
