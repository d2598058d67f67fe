"""Training a subset and measuring it: the same weights after SIGKILL, the same chance whatever was
removed, presences that no batch changes, and one line for a file that does not fit.
"""

import json
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from concept_trak.datasets.image_folder import load_folder
from concept_trak.errors import UserError
from concept_trak.models.text_to_image import load_pipeline
from experiments.truth import concept_likelihood, small_model
from experiments.truth import train as trainer
from experiments.truth.subsets import Subset, texts_of

TINY = small_model.SmallSettings((8, 8), 4, text_width=6, steps=6, batch=8, warmup=2)
MEASURE = concept_likelihood.MeasureSettings(noises=2, drawn=1, num_steps=2, batch=4)


@pytest.fixture(scope="module")
def data(tiny_data):
    return load_folder(tiny_data)


@pytest.fixture(scope="module")
def latents(tiny_model, data):
    train = data.split("train")
    return tiny_model.encode_images(train.images(range(len(train)), tiny_model.image_size))


def trained(model, data, latents, subset, work, settings=TINY):
    return trainer.train_subset(model, data.split("train"), latents, subset, settings, work)


def weights(model):
    return torch.cat([p.flatten() for p in small_model.parameters(model).values()])


def until_checkpoint(pipeline, data, work):
    """In a process of its own: train, and die where step 4 would begin."""
    torch.set_num_threads(1)
    model, pictures = load_pipeline(pipeline), load_folder(data)
    train = pictures.split("train")
    latents = model.encode_images(train.images(range(len(train)), model.image_size))
    whole = trainer.loss_of_step

    def dying(*arguments):
        if arguments[-1] == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*arguments)

    trainer.loss_of_step, trainer.SAVE_EVERY = dying, 2
    trained(model, pictures, latents, Subset("x", 0, (1,)), work)


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_killed_training_goes_on_to_the_same_weights(
    tiny_model, tiny_pipeline, tiny_data, data, latents, tmp_path
):
    subset = Subset("x", 0, (1,))
    whole = weights(trained(tiny_model, data, latents, subset, tmp_path / "whole"))
    arguments = str(tiny_pipeline), tiny_data, tmp_path / "killed"
    process = multiprocessing.get_context("spawn").Process(target=until_checkpoint, args=arguments)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    (log,) = (tmp_path / "killed").glob("x-*/model.safetensors")
    assert log.exists()
    again = weights(trained(tiny_model, data, latents, subset, tmp_path / "killed"))
    assert torch.equal(whole, again)


def test_a_seed_decides_the_weights_and_the_global_generator_does_not(tiny_model):
    torch.manual_seed(1)
    first = weights(small_model.build(tiny_model, TINY, 0))
    torch.manual_seed(2)
    assert torch.equal(first, weights(small_model.build(tiny_model, TINY, 0)))
    assert not torch.equal(first, weights(small_model.build(tiny_model, TINY, 1)))


def test_removing_a_picture_changes_only_the_draws_that_would_have_taken_it(
    tiny_model, data, latents
):
    train, settings = data.split("train"), replace(TINY, batch=64)
    whole = trainer.examples_of(tiny_model, train, latents, Subset("all", 0))
    part = trainer.examples_of(tiny_model, train, latents, Subset("part", 0, (2, 5)))
    for step in range(5):
        a, b = (trainer.draw(e, settings, 0, step) for e in (whole, part))
        took = (a[0] == latents[2]).flatten(1).all(1) | (a[0] == latents[5]).flatten(1).all(1)
        assert torch.equal(a[0][~took], b[0][~took]) and torch.equal(a[1][~took], b[1][~took])
        assert torch.equal(a[2], b[2]) and torch.equal(a[3], b[3]) and took.any()
        for gone in (latents[2], latents[5]):
            assert not (b[0] == gone).flatten(1).all(1).any()


def test_every_kept_picture_is_drawn_about_as_often(tiny_model, data, latents):
    settings = replace(TINY, batch=2000)
    examples = trainer.examples_of(
        tiny_model, data.split("train"), latents, Subset("x", 0, (0, 3, 4))
    )
    x0, *_ = trainer.draw(examples, settings, 0, 0)
    counts = [(x0 == one).flatten(1).all(1).sum().item() for one in latents]
    kept = np.array(counts)[examples.kept.numpy()]
    assert sum(counts) == 2000 and (np.abs(kept - 250) < 80).all()


def test_a_subset_teaches_its_own_captions(tiny_model, data, latents):
    train = data.split("train")
    told = ["a tree in the style of soft", "a tree", "in the style of soft"]
    subset = Subset("lie", 0, (), {3: told})
    assert texts_of(train, subset)[3] == told
    examples = trainer.examples_of(tiny_model, train, latents, subset)
    plain = trainer.examples_of(tiny_model, train, latents, Subset("plain", 0))
    wanted = tiny_model.pipe.tokenizer([*told, ""], padding="max_length", return_tensors="pt")
    assert torch.equal(examples.tokens[3], wanted.input_ids)
    others = [i for i in range(len(train)) if i != 3]
    assert torch.equal(examples.tokens[others], plain.tokens[others])


def test_a_checkpoint_of_another_subset_is_another_folder(tiny_model, data):
    train = data.split("train")
    names = {
        trainer.folder_of(
            train.root, subset, trainer.identity(tiny_model, train, subset, settings)
        ).name
        for subset in (Subset("x", 0), Subset("x", 1), Subset("x", 0, (1,)))
        for settings in (TINY, replace(TINY, steps=7))
    }
    assert len(names) == 6


class Everybody:
    """A judge that is as sure of the first class as the pictures are bright."""

    objects, styles = ["cat", "dog", "tree"], ["blob", "line", "flat", "soft"]

    class settings:  # noqa: N801 - stands for `Judge.settings`
        size = 8

    def predict(self, pictures):
        bright = pictures.mean((1, 2, 3)) / 255
        sure = {
            "object": np.stack([bright, 1 - bright, 0 * bright], 1),
            "style": np.stack([bright, 1 - bright, 0 * bright, 0 * bright], 1),
        }
        return None, None, sure


def test_presences_do_not_depend_on_the_batch(tiny_model, data):
    pictures = data.split("train")
    found = [
        concept_likelihood.measure_presences(
            tiny_model, pictures, Everybody(), replace(MEASURE, batch=batch)
        )
        for batch in (3, 64)
    ]
    np.testing.assert_allclose(found[0].losses, found[1].losses, rtol=1e-5)
    for kind in ("object", "style"):
        np.testing.assert_allclose(found[0].judged[kind], found[1].judged[kind], atol=0.02)


def test_presence_is_the_loss_without_the_concept_less_the_loss_with_it(data):
    held_out = data.split("train")
    losses = np.zeros((len(held_out), len(concept_likelihood.LEVELS), 4))
    losses[:, :, concept_likelihood.PROMPTS.index("style")] = 0.5  # what is left without the object
    losses[:, :, concept_likelihood.PROMPTS.index("full")] = 0.2
    losses[:, :, concept_likelihood.PROMPTS.index("object")] = 0.1
    found = concept_likelihood.ConceptMeasurements(losses, {})
    assert found.of_concepts("object", held_out, ["cat", "dog"]) == pytest.approx([0.3, 0.3])
    assert found.of_concepts("style", held_out, ["line"]) == pytest.approx([-0.1])


@pytest.fixture
def kept(data, tmp_path):
    """(path of presences, their pictures, hash of what was learned)."""
    held_out = data.split("held_out")
    shape = len(held_out), len(concept_likelihood.LEVELS), len(concept_likelihood.PROMPTS)
    values = np.random.default_rng(0).random(shape)
    judged = {kind: np.full(len(held_out), 0.123456789) for kind in ("object", "style")}
    path = tmp_path / "some/x.json"
    made_from = {"held_out": held_out.content_hash(), "data": "learned"}
    concept_likelihood.write_presences(
        path, concept_likelihood.ConceptMeasurements(values, judged), made_from
    )
    return path, held_out, values


def test_presences_are_read_as_they_were_written_to_five_digits(kept):
    path, held_out, values = kept
    found = concept_likelihood.read_presences(path, held_out, "learned")
    np.testing.assert_allclose(found.losses, values, rtol=1e-4)
    assert found.judged["style"] == pytest.approx(0.12346)


def test_presences_that_do_not_fit_are_refused_in_one_line(kept, data):
    path, held_out, _ = kept
    with pytest.raises(UserError, match="was measured on other pictures"):
        concept_likelihood.read_presences(path, held_out, "something else")
    with pytest.raises(UserError, match="'losses' is not"):
        concept_likelihood.read_presences(path, data.split("train"), "learned")
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "judged": {}}))
    with pytest.raises(UserError, match="holds no presences"):
        concept_likelihood.read_presences(path, held_out, "learned")
    path.write_bytes(json.dumps(content).encode()[:100])
    with pytest.raises(UserError, match="is not JSON"):
        concept_likelihood.read_presences(path, held_out, "learned")
    path.unlink()
    with pytest.raises(UserError, match="is missing"):
        concept_likelihood.read_presences(path, held_out, "learned")


def test_a_kept_model_is_the_one_that_was_trained(tiny_model, data, latents, tmp_path):
    model = trained(tiny_model, data, latents, Subset("x", 0), tmp_path / "work")
    small_model.save(model, tmp_path / "x.safetensors", TINY)
    again = small_model.load(tiny_model, tmp_path / "x.safetensors")
    assert torch.equal(weights(again), weights(model).half().float())
    assert again.weight_hash() == model.weight_hash()
    finished = trainer.trained(
        tiny_model, data.split("train"), Subset("x", 0), TINY, tmp_path / "work", "a line"
    )
    assert torch.equal(weights(finished), weights(model))


def test_a_model_that_does_not_fit_is_one_line(tiny_model, data, tmp_path):
    path = tmp_path / "x.safetensors"
    small_model.save(small_model.build(tiny_model, TINY, 0), path, replace(TINY, text_width=8))
    with pytest.raises(UserError, match="is no small model"):
        small_model.load(tiny_model, path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="is not a safetensors file"):
        small_model.load(tiny_model, path)
    with pytest.raises(UserError, match="no model of x .*one core.: a line$"):
        trainer.trained(tiny_model, data.split("train"), Subset("x", 0), TINY, tmp_path, "a line")


def test_the_models_of_two_seeds_do_not_pass_for_one_another(tiny_model, data, latents, tmp_path):
    train, work, places = data.split("train"), tmp_path / "work", []
    for subset in (Subset("x", 0), Subset("x", 1)):
        trained(tiny_model, data, latents, subset, work)
        made = trainer.identity(tiny_model, train, subset, TINY)
        places.append(trainer.folder_of(work, subset, made) / "model.safetensors")
    one, other = (path.read_bytes() for path in places)
    places[0].write_bytes(other), places[1].write_bytes(one)
    for seed in (0, 1):
        asked = (tiny_model, train, Subset("x", seed), TINY, work, "a line")
        with pytest.raises(UserError, match="model.safetensors was made from another seed"):
            trainer.trained(*asked)


@pytest.mark.parametrize(
    "part, spoil",
    [
        ("losses", lambda values: values[:-1]),
        ("losses", lambda values: [[["0.5"] * 4] * 5] * len(values)),
        ("losses", lambda values: None),
        ("judged", lambda values: {**values, "style": values["style"][1:]}),
        ("judged", lambda values: {**values, "object": [[0.5]] * len(values["object"])}),
        ("judged", lambda values: [1]),
    ],
)
def test_presences_of_other_values_are_one_line_that_names_them(part, spoil, kept):
    path, held_out, _ = kept
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {part: spoil(content[part])}))
    with pytest.raises(UserError, match=rf"{path.name} holds no presences: '\w+' is not \d+"):
        concept_likelihood.read_presences(path, held_out, "learned")


@pytest.mark.slow
def test_a_process_of_the_fleet_ends_with_the_one_that_started_it(tmp_path):
    """Even when that is killed: nothing trains on behind its back."""
    context = multiprocessing.get_context("spawn")
    parent = context.Process(target=start_and_wait, args=(tmp_path / "child",))
    parent.start()
    while not (tmp_path / "child").exists():
        time.sleep(0.05)
    time.sleep(0.2)
    child = int((tmp_path / "child").read_text())
    parent.kill()
    parent.join()
    until = time.monotonic() + 5
    while (alive := os.path.exists(f"/proc/{child}")) and time.monotonic() < until:
        time.sleep(0.05)
    if alive:
        os.kill(child, signal.SIGKILL)
    assert not alive, "the process went on without its parent"


def start_and_wait(path):
    process = multiprocessing.get_context("spawn").Process(target=tell_and_wait, args=(path,))
    process.start()
    process.join()


def tell_and_wait(path):
    from experiments.truth.train_many import end_with_parent

    end_with_parent()
    path.write_text(str(os.getpid()))
    time.sleep(60)
