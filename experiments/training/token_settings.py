"""Every default of learning a token."""

from __future__ import annotations

from dataclasses import dataclass

from concept_trak.errors import UserError

FLAGS = {"steps": "steps", "lr": "learning-rate", "batch_size": "batch-size"}
PROMPT = "A picture in the style of {} art"  # AbC's train prompt of a style


@dataclass(frozen=True)
class TokenSettings:
    """How a token is learned; written into its record. UserError for a number out of range."""

    steps: int = 3000  # of the diffusers example (the paper: 5000)
    # constant: 5e-4 for each picture of a batch, as in the diffusers example with --scale_lr
    lr: float = 2e-3
    batch_size: int = 4
    weight_decay: float = 1e-2  # the diffusers example's
    random_flip: bool = False
    seed: int = 0
    # its first token is the start; empty: what follows the learned token in the prompt, or "art"
    init_word: str = ""

    def __post_init__(self) -> None:
        for name in ("steps", "lr", "batch_size"):
            value = getattr(self, name)
            if not value > 0:  # a NaN is refused, too
                told = f"{name}={value} of the token's training is not above 0"
                raise UserError(f"{told}; give --{FLAGS[name]} more")
