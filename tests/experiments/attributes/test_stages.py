"""The tables of labelled pictures, from nothing to their JSON, in seconds: what they say is another
matter.
"""

import functools
import json
import shutil

import numpy as np
import pytest
import torch
from celeba_standin import stand_in

from concept_trak.attribution.unlearning import AbU
from concept_trak.cli import main
from concept_trak.errors import UserError
from concept_trak.models.vocabulary import Vocabulary
from concept_trak.registry import BENCHMARKS
from concept_trak.settings import DAMPINGS, resolve
from experiments.attributes import command, retraining, score_cache, shapes, table
from experiments.attributes import concept_likelihood as small
from experiments.attributes.model import train as training
from experiments.attributes.pipeline import AttributeBenchmark, TrainedModel
from experiments.attributes.queries import TUNE_SEED, LabelledBenchmark, questions_of
from experiments.attributes.score_cache import MethodScores
from experiments.attributes.settings import BENCHES, of_bench

METHODS = "concept_trak,trak"
TINY = {"networks": "unet", "steps": 4, "count": 36, "lds_subsets": 4, "truth_steps": 2, "most": 2}


def bench_at(folder, bench="synthetic", methods=METHODS, **changes):
    own = of_bench(bench, TINY | {"work": str(folder)} | changes, quick=True)
    settings = resolve(bench, {"methods": methods, "nfe": 2, "epochs": 1, "proj_dim": 512})
    settings = settings.but(gen_num_inference_steps=4).on("cpu")
    return AttributeBenchmark(own, settings, "cpu")


@pytest.fixture(scope="module", autouse=True)
def few_held_out():
    """Four pictures of a combination: each is asked about, and measured on every model."""
    with pytest.MonkeyPatch.context() as patch:
        few = functools.partial(shapes.SyntheticSettings, held_out_count=16)
        patch.setattr(shapes, "SyntheticSettings", few)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A bench after all stages, and what the last one found."""
    bench = bench_at(tmp_path_factory.mktemp("labelled") / "shapes")
    return bench, command.result_of(bench, "all")


def test_every_ranker_and_the_control_have_figures_of_both_splits(made):
    _, found = made
    for split in ("id", "ood"):
        assert {"concept_trak", "trak", "caption_similarity"} <= found[split].keys()
        assert all(0 <= value <= 1 for value in found[split].values())
    assert found["control"] == found["ood"]["caption_similarity"] == 1.0  # labels are the truth
    assert json.loads(json.dumps(found)) == found


def test_the_table_is_kept_with_what_made_it_and_its_plot(made):
    bench, found = made
    tables = bench.own.folder / "tables"
    kept = json.loads((tables / "table.json").read_text())
    assert {k: kept[k] for k in found} == found
    assert kept["settings"]["methods"] == METHODS and kept["bench"]["steps"] == 4
    assert (tables / "precision.png").read_bytes()[:4] == b"\x89PNG"
    assert "| concept_trak | global |" in (tables / "table.md").read_text()


def test_a_second_run_computes_nothing_and_says_the_same(made, monkeypatch):
    bench, found = made

    def no(*args, **kwargs):
        raise AssertionError("computed again")

    monkeypatch.setattr(score_cache, "compute", no)
    monkeypatch.setattr(training, "loss_of_step", no)
    monkeypatch.setattr("experiments.attributes.queries.generate", no)
    again = bench_at(bench.own.work)
    assert command.result_of(again, "all") == found


def test_other_settings_of_pictures_or_trainings_are_refused(made):
    folder = made[0].own.work
    with pytest.raises(UserError, match="made from other settings"):
        bench_at(folder, held_out="circle blue").generate()
    with pytest.raises(UserError, match="trained with other settings"):
        bench_at(folder, steps=5).train()


def test_a_killed_training_goes_on_to_the_same_weights(made, tmp_path, monkeypatch):
    bench, _ = made
    whole = bench.task(TrainedModel("unet", 0)).model.identity()
    shutil.copytree(bench.data_dir, tmp_path / "synthetic-quick/data")
    other = bench_at(tmp_path)
    real = training.loss_of_step

    def killed(model, examples, settings, seed, step):
        if step == 3:
            raise KeyboardInterrupt
        return real(model, examples, settings, seed, step)

    monkeypatch.setattr(training, "loss_of_step", killed)
    how = training.TrainSettings(steps=4, batch=8, lr=other.own.lr, save_every=2)
    job = other.job(TrainedModel("unet", 0))
    job = training.TrainingJob(job.name, job.scheme, job.data, job.kept, job.architecture, how, 0)
    with pytest.raises(KeyboardInterrupt):
        training.train(job, tmp_path / "killed")
    assert training.finished(job, tmp_path / "killed") is None
    monkeypatch.setattr(training, "loss_of_step", real)
    resumed = training.train(job, tmp_path / "killed").identity()
    assert resumed == training.train(job, tmp_path / "whole").identity() == whole


def test_two_models_of_a_seed_share_what_both_keep(made):
    """A draw of a model that lost pictures differs only where it would have taken one of them."""
    data, scheme = made[0].labelled
    part = data.split("train")
    model = training.build_untrained(made[0].job(TrainedModel("unet", 0)), "cpu")
    some = np.arange(len(part)) % 3 > 0
    both = [training.examples_of(model, scheme, part, k) for k in (np.ones(len(part), bool), some)]
    how = training.TrainSettings(batch=64)
    (x, labels, t, eps), (y, others, u, noise) = (
        training.draw(e, model.vocabulary, how, 0, 5) for e in both
    )
    same = (x == y).flatten(1).all(1)
    kept = both[0].latents[torch.from_numpy(some)]
    of_kept = (x[:, None] == kept[None]).flatten(2).all(2).any(1)
    assert same[of_kept].all() and 0 < of_kept.sum() < len(x)
    assert torch.equal(t, u) and torch.equal(eps, noise)
    assert torch.equal(labels[same], others[same])


def test_shares_of_open_labels_are_those_of_the_settings(made):
    data, scheme = made[0].labelled
    model = training.build_untrained(made[0].job(TrainedModel("unet", 0)), "cpu")
    part = data.split("train")
    examples = training.examples_of(model, scheme, part, np.ones(len(part), bool))
    how = training.TrainSettings(batch=4000)
    opened = training.draw(examples, model.vocabulary, how, 0, 0)[1] == torch.tensor([2, 2])
    assert opened.all(1).float().mean() == pytest.approx(how.open_share, abs=0.02)
    assert (opened.sum(1) == 1).float().mean() == pytest.approx(how.partial_share, abs=0.03)


def test_celeba_hq_runs_from_its_download_to_its_table(tmp_path):
    source = stand_in(tmp_path / "source", count=200)
    changes = {"source": str(source), "attributes": "Smiling,Eyeglasses", "size": 16, "count": 0}
    changes |= {"held_out": "Smiling Eyeglasses", "most": 4}
    found = command.result_of(bench_at(tmp_path / "c", "celeba_hq", **changes), "all")
    assert found["ood"]["caption_similarity"] == found["id"]["caption_similarity"] == 1.0
    assert {"concept_trak", "trak"} <= found["ood"].keys()


def test_faces_run_from_nothing_to_their_table(tmp_path):
    for name in ("dicebear", "dicebear_styles", "resvg_py"):
        pytest.importorskip(name, reason="needs the extra faces")
    changes = {"attributes": "hat,beard", "held_out": "hat beard", "count": 48}
    found = command.result_of(bench_at(tmp_path / "f", "faces", "trak", **changes), "all")
    assert found["ood"]["caption_similarity"] == 1.0 and found["control"] == 1.0


# ---- questions


@pytest.mark.parametrize(
    "form, wanted",
    [
        ("concept", {("triangle", ""), ("red", "")}),
        ("cfg", {("triangle, red", "")}),
        ("slider", {("triangle, red", "circle, red"), ("triangle, red", "triangle")}),
    ],
)
def test_a_slider_flips_a_class_of_two_and_drops_one_of_more(form, wanted):
    words = {"shape": ("triangle", "circle"), "color": ("red", "blue", "green")}

    class Shown:
        prompt = "triangle, red"

    found = {(q.plus, q.minus) for q in questions_of(form, Vocabulary(words), Shown)}
    assert found == wanted


def test_the_evaluation_serves_these_benchmarks_too(made):
    bench, _ = made
    task = bench.task(TrainedModel("unet", 0))
    task.settings = task.settings.but(num_queries=1)
    benchmark = BENCHMARKS.get("synthetic")(task)
    assert isinstance(benchmark, LabelledBenchmark) and benchmark.concepts == ("shape", "color")
    asked = benchmark.questions("generated")
    assert [q.words for q in asked["ood"]] == ["triangle", "red"]
    assert benchmark.relevant(asked["ood"][0]).mean() == pytest.approx(1 / 3)


# ---- the table


def found_of(hits, split, concepts=1):
    """A `MethodScores` of questions whose ten highest are relevant in a share of `hits` [D, Q]."""
    top = np.arange(10) < np.round(10 * np.asarray(hits))[..., None]
    count = top.shape[1]
    group = np.arange(count) // concepts
    concept = np.array([f"c{i % concepts}" for i in range(count)])
    chance = np.full(count, 0.3)
    return MethodScores(top, np.zeros(top.shape[:2]), chance, np.array(split), concept, group, 1.0)


def summarised(found):
    chosen = {name: score_cache.damping_of(models) for name, models in found["local"].items()}
    return table.summarised(found, chosen)


def test_the_damping_is_chosen_on_drawings_that_are_not_reported():
    hits = np.zeros((len(DAMPINGS), 4))
    hits[2, :2], hits[7, 2:] = 1.0, 1.0  # best on tune, best on ood
    models = {TrainedModel("unet", 0): found_of(hits, ["tune", "tune", "ood", "ood"])}
    told = summarised({"local": {"trak": models}})["local"]["trak"]
    assert told["damping"] == DAMPINGS[2]
    assert told["ood"]["precision"] == 0.0 and told["ood"]["oracle"] == 1.0


def test_a_step_is_chosen_as_a_damping_is_and_has_no_oracle():
    hits = np.zeros((len(AbU.candidates), 2))
    hits[1] = 1.0
    tune, reported = found_of(hits, ["tune"] * 2), found_of([[0.3, 0.6]], ["ood", "id"])
    models = {TrainedModel("unet", 0): tune.and_at(1, reported)}
    told = summarised({"local": {"abu": models}})["local"]["abu"]
    assert told["step"] == AbU.candidates[1] and told["damping"] is None
    assert [told[split]["precision"] for split in ("ood", "id")] == [0.3, 0.6]
    assert told["ood"]["oracle"] is None
    assert "| abu | local | 1 | 0.60 [0.60, 0.60] | 0.30 [0.30, 0.30] |  | 0.00 |" in (
        table.markdown_of("faces", {"local": {"abu": told}})
    )


def test_reported_questions_are_asked_at_the_chosen_step_alone(made, monkeypatch):
    asked = []

    def rank(self, questions):
        seeds = {q.picture.source["generated"]["seed"] >= TUNE_SEED for q in questions}
        asked.append((self.step, seeds))
        values = np.zeros((1, len(questions), len(self.task.data)))
        values[..., :: 2 if self.step == 10.0 else 1] = 1.0
        return values

    monkeypatch.setattr(AbU, "rank", rank)
    monkeypatch.setattr(AbU, "prepare", lambda self: None)
    monkeypatch.setattr(score_cache, "damping_of", lambda models: 1)
    bench = bench_at(made[0].own.work, methods="abu")
    found = score_cache.attribute(bench)["local"]["abu"]
    assert asked == [(step, {True}) for step in AbU.candidates] + [(10.0, {False})]
    one = found[TrainedModel("unet", 0)]
    reported = one.split != "tune"
    assert one.top[1, reported].any() and not one.top[[0, 2]][:, reported].any()


def test_each_network_has_its_own_rows_at_the_common_damping():
    hits = np.zeros((len(DAMPINGS), 4))
    hits[2, :2], hits[2, 2:] = 1.0, 0.7
    weak = np.zeros((len(DAMPINGS), 4))
    weak[7] = 0.9  # alone it would choose another
    of = [found_of(h, ["tune", "tune", "ood", "ood"]) for h in (hits, weak)]
    both = {"local": {"trak": {TrainedModel("unet", 0): of[0], TrainedModel("dit", 0): of[1]}}}
    chosen = {"trak": 2}
    told = {
        network: table.summarised({"local": table.of_network(both["local"], network)}, chosen)
        for network in ("unet", "dit")
    }
    precisions = [t["local"]["trak"]["ood"]["precision"] for t in told.values()]
    assert precisions == [0.7, 0.0] and told["dit"]["local"]["trak"]["models"] == 1


def test_the_margin_is_over_the_best_rival_and_paired():
    def models(value):
        return {TrainedModel("unet", 0): found_of([[value] * 4], ["tune", "tune", "ood", "ood"])}

    rankers = {"concept_trak": models(0.9), "trak": models(0.2), "das": models(0.5)}
    told = table.margin(rankers, {name: 0 for name in rankers})["concept_trak"]
    assert told == {"over": "das", "margin": 0.4, "ci95": [0.4, 0.4]}


# ---- retraining


@pytest.fixture
def retrained(made, monkeypatch):
    """The bench with its trainings done and measured here, one after the other."""

    def here(bench, plan, work):
        for subset in plan.subsets:
            if not bench.presences(plan.name, subset).exists():
                work.make(bench, plan, subset)

    monkeypatch.setattr(retraining, "retrain", here)
    measure = small.LabelledMeasure(noises=1, num_steps=2)
    setup = functools.partial(small.ClassConditionalSetup, measure=measure)
    monkeypatch.setattr(retraining, "ClassConditionalSetup", setup)
    bench = made[0]
    bench.settings = bench.settings.but(retrain=True)
    return bench


def test_lds_and_counterfactual_tell_every_ranker_from_kept_presences(retrained):
    told = command.result_of(retrained, "lds")
    assert told["subsets"] == 4 and told["models"] == 8
    for name in ("concept_trak", "trak", "caption_similarity"):
        assert -1 <= told[name]["lds"] <= 1 and len(told[name]["ci95"]) == 2
    assert abs(told["caption_similarity"]["partial"]) < 1e-9  # counts labels, which is given
    again = command.result_of(bench_at(retrained.own.work), "lds")
    assert again["trak"] == told["trak"]
    found = command.result_of(retrained, "counterfactual")
    arms = {"concept_trak", "trak", "labels", "random", "least"}
    assert arms <= found["shape"].keys() and arms <= found["color"].keys()
    assert found["shape"]["labels"]["removed"] == found["shape"]["random"]["removed"]
    retrained.settings = retrained.settings.but(methods="contrast")
    more = command.result_of(retrained, "counterfactual")
    assert set(more["shape"]) - set(found["shape"]) == {"contrast"}
    assert more["shape"]["trak"] == found["shape"]["trak"]


def test_a_presence_is_what_a_label_takes_off_the_loss(made):
    """Against the definition, one picture and noise at a time."""
    bench, _ = made
    model = bench.task(TrainedModel("unet", 0)).model
    held_out = bench.labelled[0].split("held_out").subset([0, 5])
    labels = [model.vocabulary.parse(c) for c in held_out.captions]
    measure = small.LabelledMeasure(noises=1, batch=2)
    found = small.concept_llr(model, held_out, labels, measure)
    x0 = model.encode_images(held_out.images(range(2), model.image_size))
    total = 0.0
    for t in small.LEVELS:
        eps = small.draw_noise(measure.noise_seed, range(1), t, model.latent_shape)
        alpha, sigma = model.schedule.level(t)
        losses = [
            (model.eps(alpha * x0[1:] + sigma * eps, t, model.encode_labels([told])) - eps)
            .square()
            .mean()
            for told in ({"color": labels[1]["color"]}, labels[1])
        ]
        total += float(losses[0] - losses[1])
    assert found["shape"][1] == pytest.approx(total / len(small.LEVELS), rel=1e-3, abs=1e-7)


# ---- bad input


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["--benches", "shapes"], "shapes"),
        (["--benches", ""], "BENCHES is empty"),
        (["--benches", "synthetic", "--networks", "gan"], "gan"),
        (["--benches", "synthetic", "--seeds", "x"], "SEEDS"),
        (["--benches", "synthetic", "--count", "0"], "COUNT=0"),
        (["--benches", "synthetic", "--shapes", "star"], "star"),
        (["--benches", "synthetic", "--stage", "lds"], "RETRAIN=1"),
        (["--benches", "celeba_hq"], "SOURCE is empty"),
        (["--benches", "celeba_hq", "--source", "/nowhere"], "attribute file"),
        (["--benches", "faces", "--attributes", "hat,nose"], "nose"),
        (["--benches", "synthetic", "--methods", "magic"], "magic"),
    ],
)
def test_bad_input_is_one_line_that_names_it(tmp_path, capsys, arguments, named):
    given = ["labelled", *arguments, "--quick", "1", "--work", str(tmp_path / "w")]
    assert main(given) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert named in lines[-1] and lines[-1].startswith("error: ")


def test_every_bench_has_settings_of_its_own_name():
    for name in BENCHES:
        assert of_bench(name, {}).bench == name
        assert BENCHMARKS.get(name).settings["layer"] == resolve(name, {}).layer
