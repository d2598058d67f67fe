"""AbC in small: what is asked, what the protocols differ in, and one run of all of it on the tiny
model.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from concept_trak import cli
from concept_trak.attribution.task import AttributionTask
from concept_trak.attribution.unlearning import AbU
from concept_trak.datasets.image_folder import load_folder
from concept_trak.errors import UserError
from concept_trak.gradients.objectives import Objective
from concept_trak.registry import OBJECTIVES
from concept_trak.settings import DAMPINGS, ROOT, TOKEN, resolve
from experiments.emoji.abc import figures as plots
from experiments.emoji.abc import gradients, methods, scores, tables
from experiments.emoji.abc.tasks import read_tokens, tasks_of
from experiments.overview import STEPS
from experiments.training.token_settings import TokenSettings

TABLE = [("pen", "tune", "object"), ("chalk", "report", "style"), ("cup", "distractor", "object")]
EACH = 3


@pytest.fixture(scope="module")
def data(tiny_data, tmp_path_factory):
    """The tiny pictures with three groups of exemplars."""
    root = tmp_path_factory.mktemp("small_abc") / "data"
    shutil.copytree(tiny_data, root)
    (root / "tables").mkdir()
    lines = ["token\tsplit\tkind\tobject\tobject_phrase\tstyle\tunicode\ticon"]
    lines += ["\t".join([*row, "x", "an x", "y", "1", "i"]) for row in TABLE for _ in range(EACH)]
    (root / "tables/exemplars.tsv").write_text("\n".join(lines) + "\n")
    shown = np.random.default_rng(1).integers(0, 256, (EACH * len(TABLE), 16, 16, 3), np.uint8)
    np.savez(root / "exemplars.npz", pictures=shown)
    return root


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(gradients, "TRAINING", TokenSettings(steps=2, batch_size=2))


def flags(tiny_pipeline, data, folder):
    given = {
        "sd_model_path": tiny_pipeline,
        "data_dir": data,
        "grad_dir": folder / "grads",
        "results_dir": folder / "results/qual",
        "proj_type": "random_mask",
        "proj_dim": 32,
        "nfe": 3,
        "epochs": 1,
        "num_split": 1,
        "gen_num_inference_steps": 5,
    }
    return [f"--{k.replace('_', '-')}={v}" for k, v in given.items()]


def test_queries_hold_the_token_beside_something_known_and_not_more(data):
    train = load_folder(data).split("train")
    tasks = tasks_of(read_tokens(data), train)
    assert {t.token.name for t in tasks} == {"pen", "chalk"}  # none of a distractor
    assert [t.number for t in tasks] == list(range(len(tasks)))
    for task in tasks:
        assert task.prompt.count(TOKEN) == 1 and TOKEN not in task.without
        known = train.column("style_phrase" if task.token.kind == "object" else "object_phrase")
        assert any(word in task.without for word in known)
    again = tasks_of(read_tokens(data), train)
    assert [t.prompt for t in tasks] == [t.prompt for t in again]


def test_committed_exemplars_are_48_queries_of_unseen_things():
    root = ROOT / "data/emoji"
    tokens, train = read_tokens(root), load_folder(root).split("train")
    tasks = tasks_of(tokens, train)
    assert sum(t.token.split == "report" for t in tasks) == 48
    assert all(3 <= len(t.pictures) <= 8 for t in tokens)
    text = (root / "tables/exemplars.tsv").read_text().splitlines()
    seen = {(r["object"], r["style"]) for r in load_folder(root).records}
    objects = {r["object"] for r in train.records}
    for line in text[1:]:
        name, _, _, thing, _, style, *_ = line.split("\t")
        assert (thing, style) not in seen and thing not in objects, name
    assert (root / "exemplars.npz").stat().st_size < 2e6


@pytest.mark.parametrize("damage", ["missing", "cut", "short"])
def test_exemplars_that_do_not_fit_are_told_in_one_line(damage, data, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(data, root)
    path = root / "exemplars.npz"
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:100])
    else:
        np.savez(path, pictures=np.zeros((2, 8, 8, 3), np.uint8))
    with pytest.raises(UserError, match="exemplars.npz.*build it"):
        read_tokens(root)


def test_the_whole_of_it_runs_and_a_second_run_says_the_same(
    tiny_pipeline, data, tmp_path, quick, capsys
):
    chosen = ["small-abc", "--device=cpu", "--methods=concept_trak,contrast,trak,blindfold"]
    given = [*chosen, *flags(tiny_pipeline, data, tmp_path)]
    assert cli.main(given) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["queries"] == 3  # as many as there are objects
    for protocol in ("published", "blind", "crowd"):
        assert {"trak", "blindfold", "caption_similarity", "chance"} <= found[protocol].keys()
        assert all(0 <= value <= 1 for value in found[protocol].values())
    # text alone finds what is captioned, and nothing that is not
    assert found["published"]["caption_similarity"] == 1
    figures = found["figures"]
    # the empty caption has no contrast with itself: such rows are zero, and rank by their place
    assert figures["contrast"]["blind"]["recall_at_10"] == found["blind"]["contrast"]
    assert cli.main(given) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found
    made = tmp_path / "results/qual/abc_tables/latest"
    assert Image.open(made / "recall.png").size[0] > 900  # three panels
    assert not (made / "ablation.png").exists()  # not all of its steps were asked for


RIVALS = ("das_paper", "journey_trak", "grad_cos", "ekfac", "abu", "nda")


def test_every_ranker_can_be_asked(tiny_pipeline, data, tmp_path, quick, capsys):
    given = flags(tiny_pipeline, data, tmp_path)
    chosen = ["small-abc", "--device=cpu", f"--methods={','.join(RIVALS)}", *given]
    assert cli.main(chosen) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(RIVALS) <= found["published"].keys()
    figures = found["figures"]
    assert figures["abu"]["blind"]["chosen"] in AbU.candidates
    assert figures["ekfac"]["crowd"]["chosen"] in DAMPINGS
    assert figures["nda"]["blind"]["chosen"] is None
    # patches know no captions; an unlearned picture's loss does
    assert found["published"]["nda"] == found["blind"]["nda"]
    kept = sorted(path.name for path in (tmp_path / "results/qual/abc/passes").glob("abu-*.npy"))
    assert "abu-pen-1.npy" in kept and "abu-pen-100.npy" in kept  # the tune token, at every step
    assert cli.main(chosen) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == found


def test_values_are_split_by_protocol(tiny_pipeline, data, tmp_path, quick):
    given = {"sd_model_path": str(tiny_pipeline), "data_dir": str(data)}
    settings = resolve("emoji", given | {"gen_num_inference_steps": 3})
    attribution_task, tokens = AttributionTask(settings, "cpu"), read_tokens(data)
    asked = scores.AbcQueries(
        attribution_task, tokens, tasks_of(tokens, attribution_task.train), tmp_path
    )
    gallery = gradients.CandidateImages(attribution_task, tokens[1], tokens)
    count, where = len(attribution_task.train), np.arange(len(gallery))
    found = asked.by_protocol(np.tile(where, (1, len(asked.tasks), 1)))
    (q, *_) = asked.of_token(tokens[1])
    named = [gallery.captions[i] for i in found["published"][0, q, count:]]
    assert named == [tokens[1].train_prompt] * EACH
    own = found["blind"][0, q, count:]
    assert [gallery.captions[i] for i in own] == [""] * EACH
    torch.testing.assert_close(  # the same pictures, captioned and not
        gallery.latents[own], gallery.latents[count : count + EACH]
    )
    assert [gallery.captions[i] for i in found["crowd"][0, q, count:]] == [""] * EACH * len(TABLE)
    x0, _ = gallery.batch(range(count - 1, count + 2))
    torch.testing.assert_close(x0.cpu(), gallery.latents[count - 1 : count + 2])


def test_an_unknown_method_is_named(tiny_pipeline, data, tmp_path, capsys):
    given = flags(tiny_pipeline, data, tmp_path)
    assert cli.main(["small-abc", "--device=cpu", "--methods=trac", *given]) == 2
    assert "METHODS='trac' is unknown" in capsys.readouterr().err


def test_a_crowd_holds_all_exemplars_and_only_the_own_are_relevant(
    tiny_pipeline, data, tmp_path, quick
):
    settings = resolve(
        "emoji",
        {"sd_model_path": str(tiny_pipeline), "data_dir": str(data), "gen_num_inference_steps": 3},
    )
    attribution_task, tokens = AttributionTask(settings, "cpu"), read_tokens(data)
    tasks = tasks_of(tokens, attribution_task.train)
    asked = scores.AbcQueries(attribution_task, tokens, tasks, tmp_path)
    count = len(attribution_task.train)
    for protocol, width in (("published", EACH), ("blind", EACH), ("crowd", EACH * len(TABLE))):
        relevant = asked.relevant(protocol)
        assert relevant.shape == (len(tasks), count + width) and (relevant.sum(1) == EACH).all()
        assert not relevant[:, :count].any()
    found = scores.controls_of(asked)["pixel_neighbours"].of
    own = [asked.relevant(p)[:, count:].nonzero()[1].reshape(-1, EACH) for p in scores.PROTOCOLS]
    for q in range(len(tasks)):  # the same distances, wherever the exemplars stand
        one = found["blind"][0, q, count:][own[1][q]]
        np.testing.assert_array_equal(one, found["crowd"][0, q, count:][own[2][q]])


def test_a_level_with_a_far_larger_gradient_is_all_that_a_row_says(tiny_pipeline, data):
    def loud(denoiser, state):
        eps_hat = denoiser.eps(state.x_t, state.t, state.cond)
        return eps_hat, eps_hat.detach() * (100 if state.t == 900 else 1)

    given = {"sd_model_path": str(tiny_pipeline), "data_dir": str(data), "f": "loud", "nfe": 4}
    with OBJECTIVES.temporary("loud", Objective(loud)):
        settings = resolve("emoji", given | {"normalize": False})
        alone = gradients.level_shares(AttributionTask(settings, "cpu"), pictures=3)
        mended = gradients.level_shares(
            AttributionTask(settings.but(normalize=True), "cpu"), pictures=3
        )
    assert set(alone) == {100, 500, 900} and sum(alone.values()) == pytest.approx(1, abs=1e-3)
    assert alone[900] > 0.99 and max(mended.values()) < 0.5


def test_hubs_are_the_pictures_that_every_question_finds():
    same = np.tile(np.arange(40.0), (5, 1))
    assert tables.hubness(same) == 1
    own = np.zeros((4, 40))
    for q in range(4):
        own[q, 10 * q : 10 * q + 10] = 1
    assert tables.hubness(own) == 10 / 40


def test_the_ablation_is_drawn_beside_the_paper():
    steps = [{"change": c, "ci95": [c - 0.1, c + 0.1]} for c in (0.2, -0.3, 0.1, 0.4)]
    ours, changes = plots.ablation([0.4, 0.6, 0.3, 0.4, 0.8], steps).axes
    assert [bar.get_width() for bar in changes.patches] == [0.2, -0.3, 0.1, 0.4]
    assert [label.get_text() for label in ours.get_yticklabels()] == list(STEPS)
    tops = [bar.get_y() for bar in changes.patches]
    assert tops == sorted(tops, reverse=True)  # the first step at the top


def test_steps_are_paired_differences():
    told = {n: {"published": {"per_query": v}} for n, v in {"a": [0, 1, 0], "b": [1, 1, 1]}.items()}
    (step,) = tables.steps(told, ("a", "b"))
    assert step["change"] == round(2 / 3, 4) and step["ci95"][0] >= 0


def test_a_blindfold_takes_every_caption(data, tiny_pipeline):
    settings = resolve("emoji", {"sd_model_path": str(tiny_pipeline), "data_dir": str(data)})
    attribution_task = AttributionTask(settings, "cpu")
    other = methods.without_captions(attribution_task)
    assert set(other.train.captions) == {""} and all(attribution_task.train.captions)
    assert other.data.content_hash() != attribution_task.data.content_hash()
