"""Controls: rankings that know nothing of the model's training, to be reported beside attribution.

    pixel_neighbours    -||x_i - x_q||_2 on RGB pictures at the model's size
    latent_neighbours   -||z_i - z_q||_2 on VAE latents
    caption_similarity  share of the concept's words in the caption (captions name the truth in the emoji data, so this is strong)
"""

from __future__ import annotations

import re

import numpy as np
import torch

from .attribute import generate


def control_scores(corpus, kind: str, cells: list) -> dict[str, np.ndarray]:
    """{control: [cells, concepts, N]}; the picture is the generated or the real one of the cell."""
    size = corpus.model.image_size
    train_pixels = corpus.train.images(range(len(corpus.train)), size=size).reshape(len(corpus.train), -1).astype(np.float32)
    pictures = [_picture(corpus, kind, cell) for cell in cells]
    pixels = np.stack([p.reshape(-1) for p in pictures]).astype(np.float32)
    latents = torch.cat([corpus.model.encode_images(p[None]) for p in pictures]).flatten(1).float().cpu().numpy()
    train_latents = corpus.latents.flatten(1).float().numpy()
    both = (len(next(iter(cells)).words), 1)
    return {
        "pixel_neighbours": np.stack([-distances(pixels, train_pixels)] * both[0], 1),
        "latent_neighbours": np.stack([-distances(latents, train_latents)] * both[0], 1),
        "caption_similarity": np.array([[overlap(word, corpus.train.captions) for word in cell.words.values()] for cell in cells]),
    }


def _picture(corpus, kind: str, cell) -> np.ndarray:
    if kind == "real":
        return corpus.everything.images([cell.row], size=corpus.model.image_size)[0]
    return np.asarray(generate(corpus, cell.caption, corpus.settings.seed).image)


def distances(queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Euclidean distances [Q, N] of [Q, D] and [N, D]."""
    return np.sqrt(np.maximum((queries**2).sum(1)[:, None] + (rows**2).sum(1) - 2 * queries @ rows.T, 0))


def overlap(concept: str, captions: list[str]) -> np.ndarray:
    """[N] share of the concept's words that each caption holds, "a" and "an" left out."""
    words = [set(re.findall(r"\w+", c.lower())) for c in [concept, *captions]]
    wanted = words[0] - {"a", "an", "the"}
    return np.array([len(wanted & w) / len(wanted) for w in words[1:]], dtype=np.float32)
