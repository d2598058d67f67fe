"""`concept-trak train-token`: learn a token from pictures, or the tokens of AbC's tasks; every
default of that training.

A token is learned by Textual Inversion (`textual_inversion`, Gal et al. 2023): min over its
embedding of E || eps - eps_theta(x_t, t, c) ||^2.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from concept_trak.flags import add_setting_flags, boolean, place, settings_of
from concept_trak.settings import TOKEN, Settings, results_folder
from experiments.training.token_settings import TokenSettings

# Stages and fields of `Settings` that its help shows.
USES = (
    "tasks",
    "prompt",
    "seed",
    "batch_size",
    "data_dir",
    "results_dir",
    "model",
    "device",
    "gpu_id",
)


def add_parser(verbs: Any) -> None:
    """The sub-command `train-token`: its own flags, and those of `Settings` that bear on it."""
    says = "Learn a token such as <new1> from a few pictures (Textual Inversion)."
    sub = verbs.add_parser("train-token", help=says, description=says)
    default, flag = TokenSettings(), sub.add_argument
    source = "a folder or picture files (default: the exemplars of the tasks --task-idx)"
    flag("--images", nargs="+", type=place, metavar="PATH", help=source)
    flag(
        "--new-token",
        default=TOKEN,
        metavar="TEXT",
        help=f"which --prompt must hold (default: {TOKEN})",
    )
    start = 'its first token is the start (default: what follows the token in the prompt, or "art")'
    flag("--init-word", default="", metavar="TEXT", help=start)
    batch = f"{default.batch_size} pictures, or of --batch-size"
    steps = f"of the training (steps of {batch}; default: {default.steps})"
    flag("--steps", type=int, default=default.steps, metavar="N", help=steps)
    rate = f"of AdamW, constant (above 0; default: {default.lr})"
    flag("--learning-rate", type=float, default=default.lr, metavar="X", help=rate)
    flip = "also learn from mirrored pictures (default: 0)"
    flag("--random-flip", metavar="0|1", type=boolean, default=default.random_flip, help=flip)
    folder = "for the token, its record and checkpoint (default: tokens, beside RESULTS_DIR)"
    flag("--out-dir", type=place, metavar="FOLDER", help=folder)
    add_setting_flags(sub, USES)
    sub.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Train as the flags say; DTYPE=auto means fp32 here. UserError as the training raises it."""
    given = settings_of(arguments)
    settings = TokenSettings(
        arguments.steps,
        arguments.learning_rate,
        arguments.batch_size or TokenSettings.batch_size,
        random_flip=arguments.random_flip,
        seed=given.seed,
        init_word=arguments.init_word,
    )
    folder = Path(arguments.out_dir or results_folder(given, "tokens"))
    words = {"prompt": arguments.prompt or "", "token": arguments.new_token}
    images = arguments.images
    jobs = [(images, folder, words)] if images else jobs_of_tasks(given)

    from concept_trak.models.device import pick_device
    from concept_trak.models.text_to_image import load_pipeline
    from experiments.training.textual_inversion import train_token

    device = pick_device(given.device, given.gpu_id)
    dtype = "fp32" if given.dtype == "auto" else given.dtype
    model = load_pipeline(given.sd_model_path, device, dtype, given.lora_path)
    for images, folder, words in jobs:
        path = train_token(model, images, folder, settings=settings, **words)
        digest = model.tokens[words["token"]][:10]
        print(f"{os.path.relpath(path)}: {words['token']}, sha256 of its embedding {digest}")


def jobs_of_tasks(given: Settings) -> list[tuple[list[Path], Path, dict[str, str]]]:
    """(exemplars, folder, prompt and token) of each model among the tasks TASK_IDX, in the folders
    where tasks look for tokens.
    """
    from .tasks import chosen_tasks, exemplars, token_folder

    root, jobs = Path(given.data_dir), []
    for task in {task.model_path: task for task in chosen_tasks(given).values()}.values():
        folder = token_folder(root, task)
        jobs.append((exemplars(root, task), folder, {"prompt": task.train_prompt, "token": TOKEN}))
    return jobs
