"""Controls: rankings that know nothing of the model's training, to be reported beside attribution.

pixel_neighbours    -||x_i - x_q||_2 on RGB pictures at the model's size
latent_neighbours   -||z_i - z_q||_2 on VAE latents
caption_similarity  share of the concept's words in the caption (captions name the truth in the emoji data, so this is strong)
"""

from __future__ import annotations

import re

import numpy as np


def control_scores(corpus, pictures, kind: str) -> dict[str, np.ndarray]:
    """{control: [cells, concepts, N]} for the pictures of a kind (`evaluate.Pictures`)."""
    cells, size = pictures.cells, corpus.model.image_size
    pixels, latents = pictures.pixels[kind], pictures.latents[kind]
    train_pixels = corpus.train.images(range(len(corpus.train)), size=size)
    concepts = len(cells[0].words)
    near = {
        "pixel_neighbours": -distances(_flat(pixels), _flat(train_pixels)),
        "latent_neighbours": -distances(
            _flat(latents.float().cpu().numpy()), _flat(corpus.latents.float().numpy())
        ),
    }
    found = {name: np.stack([values] * concepts, 1) for name, values in near.items()}
    found["caption_similarity"] = np.array(
        [[overlap(word, corpus.train.captions) for word in cell.words.values()] for cell in cells]
    )
    return found


def _flat(x: np.ndarray) -> np.ndarray:
    return x.reshape(len(x), -1).astype(np.float32)


def distances(queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Euclidean distances [Q, N] of [Q, D] and [N, D]."""
    return np.sqrt(
        np.maximum((queries**2).sum(1)[:, None] + (rows**2).sum(1) - 2 * queries @ rows.T, 0)
    )


def overlap(concept: str, captions: list[str]) -> np.ndarray:
    """[N] share of the concept's words that each caption holds, "a" and "an" left out."""
    words = [set(re.findall(r"\w+", c.lower())) for c in [concept, *captions]]
    wanted = words[0] - {"a", "an", "the"}
    return np.array([len(wanted & w) / len(wanted) for w in words[1:]], dtype=np.float32)
