"""The trainings of the experiments, and other long work, at a size that takes a second: small
networks, a few steps, a checkpoint at every other one, and their folders below `root` instead of
the repository.
"""

import functools
from pathlib import Path

from conftest import tiny_text_encoder, tiny_unet, tiny_vae


def train_model(root: Path) -> None:
    """For `concept-trak train-model`."""
    from experiments import cli
    from experiments.emoji.model import autoencoder, pipeline, train
    from experiments.training.loop import LrPhase

    cli.ROOT, pipeline.IMAGE_SIZE = root, 8
    pipeline.build_vae, pipeline.build_text_encoder = tiny_vae, tiny_text_encoder
    pipeline.build_unet = functools.partial(tiny_unet, None)
    autoencoder.LOOP["save_every"] = 2
    train.Run = functools.partial(often, train.Run)
    few = (LrPhase(3, 3),)
    phases = {"vae_phases": few, "decoder_phases": few, "unet_phases": few}
    batches = {"vae_batch": 2, "decoder_batch": 2, "unet_batch": 2, "jitters": 1}
    train.TrainSettings = functools.partial(train.TrainSettings, **phases, **batches)


def often(make, *args, **options):
    """A run that keeps a checkpoint at every other step."""
    return make(*args, **options | {"save_every": 2})


def train_judge(root: Path) -> None:
    """For `concept-trak train-judge`; without cross-validation, whose folds need more pictures."""
    from experiments import cli
    from experiments.emoji.classifier import train

    small = {"size": 16, "inner_size": 16, "width": 4, "epochs": 1, "fold_epochs": 1, "batch": 8}
    settings = train.EmojiClassifierSettings(**small, dropout=0.0)
    cli.JUDGE = root / "data/emoji/judge"
    train.train_and_save = functools.partial(train.train_and_save, folds=0, settings=settings)


def judge_model(root: Path) -> None:
    """For `concept-trak judge-model`, by the judge that `train_judge` left."""
    from experiments.emoji import model_quality as model

    model.JUDGE, model.SEEDS = root / "data/emoji/judge", 1


def train_token(root: Path) -> None:
    """For `concept-trak train-token`."""
    from experiments.training import textual_inversion

    textual_inversion.SAVE_EVERY = 1


def prepare(root: Path) -> None:
    """For `concept-trak prepare`: a step is on the disk as soon as it is encoded, and each picture
    that is encoded gets a line in encoded.txt beside `root`.
    """
    from concept_trak.datasets import prepare as module

    encoded, told = module.encoded, root.parent / "encoded.txt"

    def counted(model, data, rows):
        made = encoded(model, data, rows)
        with told.open("a") as file:  # after the work: what a kill stops was not encoded
            file.writelines(f"{row}\n" for row in rows)
        return made

    module.SYNC_SECONDS, module.encoded = 0, counted


def download(root: Path) -> None:
    """For the downloads: small pieces, and py7zr whatever the machine has."""
    from experiments.abc.download import archives, folder, hub

    hub.CHUNK, archives.PROGRAMS, folder.SPARE = 500, (), 0


SMALLER = {
    "train-model": train_model,
    "train-judge": train_judge,
    "judge-model": judge_model,
    "train-token": train_token,
    "prepare": prepare,
    "download-abc": download,
    "download-train-grad": download,
}
