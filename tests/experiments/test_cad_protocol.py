"""The published protocols on stand-ins: a tiny pipeline, tiny networks of random weights that
measure, and independent computations of what they must find.
"""

import csv
import json
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from concept_trak import cli
from concept_trak.components.edits import load_edit, make_edit, save_edit
from concept_trak.models.text_to_image import load_pipeline
from concept_trak.settings import flat_fields, resolve
from experiments.cad.protocol import (
    frechet,
    lpips,
    metric_models,
    nudity,
    objects,
    prompts,
    result,
    run,
)
from experiments.cad.protocol import images as pictures

SIDE = 32
PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": SIDE},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": SIDE, "width": SIDE},
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.25, 0.25, 0.25],
}


def save_classifier(folder, names=objects.CLASSES):
    """A ResNet of random weights whose classes have ImageNet's kind of names."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    labels = {i: f"{name}, also {name}" for i, name in enumerate(names)}
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", id2label=labels
    )
    model = ResNetForImageClassification(config).eval()
    x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():  # or one class would win everywhere
        logits = model(torch.nn.functional.interpolate(x, (SIDE, SIDE), mode="bicubic")).logits
        model.classifier[-1].bias.sub_(logits.mean(0))
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


def save_clip(folder):
    """A CLIPModel of random weights with the embedded model's kind of tokenizer."""
    from transformers import CLIPConfig, CLIPModel

    from experiments.emoji.model.pipeline import MAX_TOKENS, build_tokenizer

    torch.manual_seed(0)
    tokenizer = build_tokenizer(["a cat in the style of blob", "a dog and a tree"])
    small = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1}
    small |= {"num_attention_heads": 2, "projection_dim": 6, "initializer_factor": 5.0}
    text = small | {"vocab_size": len(tokenizer), "max_position_embeddings": MAX_TOKENS}
    text |= {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("bos", "eos", "pad")}
    vision = small | {"image_size": SIDE, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=6)
    CLIPModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


def save_alexnet(path):
    """AlexNet's convolutions of random weights, in a file as torchvision names them."""
    torch.manual_seed(0)
    save_file({f"features.{k}": v for k, v in lpips.alexnet_features().state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nets")
    save_classifier(folder / "classifier")
    save_clip(folder / "clip")
    save_alexnet(folder / "alexnet.safetensors")
    return folder


@pytest.fixture(scope="module")
def edit(tiny_pipeline, tmp_path_factory):
    """An edit that says it erases "church": one in two weights of a layer turned round."""
    network = load_pipeline(str(tiny_pipeline)).network
    name = next(n for n, w in network.named_parameters() if "attn2.to_out.0.weight" in n)
    weight = network.get_parameter(name).detach().flatten()
    index = torch.arange(0, len(weight), 2)
    made = make_edit(network, {name: -9 * weight[index]}, {name: index})
    made.about.update(prompt="a church", aim="erase")
    path = tmp_path_factory.mktemp("edit") / "edit.safetensors"
    save_edit(path, made)
    return path


@pytest.fixture
def given(tiny_pipeline, nets, edit, tmp_path):
    return {
        "sd_model_path": tiny_pipeline,
        "edits": edit,
        "results_dir": tmp_path / "results/qual",
        "classifier": nets / "classifier",
        "clip_model": nets / "clip",
        "alexnet_path": nets / "alexnet.safetensors",
        "gen_num_inference_steps": 2,
        "batch_size": 16,
        "seeds_per_prompt": 2,
        "device": "cpu",
    }


@pytest.fixture
def few(given, tmp_path):
    """The same about four classes."""
    file = tmp_path / "classes.txt"
    file.write_text("tench\nchurch\ngolf ball\nparachute\n")
    return given | {"prompts_file": file}


def main(given, **also):
    values = given | also
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
    return cli.main(["cad-protocol", "--benchmark=own", *flags])


def line_of(capsys):
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def latest(given):
    return given["results_dir"] / "protocol/latest"


def pairs(given):
    """Rows of pictures.csv, and the files of the original's and the edited pictures."""
    with open(latest(given) / "pictures.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    below = latest(given).parent / "pictures"
    return rows, *([below / row[side] for row in rows] for side in ("original", "edited"))


def holds(figure):
    return figure["ci95"][0] <= figure["value"] <= figure["ci95"][1]


def test_objects_are_counted_as_the_classifier_names_them(given, nets, capsys, monkeypatch):
    from transformers import AutoModelForImageClassification

    assert main(given) == 0
    line = line_of(capsys)
    assert line["erased"] == ["church"] and line["pictures"] == 20
    rows, before, after = pairs(given)
    model = AutoModelForImageClassification.from_pretrained(nets / "classifier").eval()
    rates = []
    for files in (before, after):  # the processor's arithmetic by hand: 8 pixels to 32, normed
        x = [
            np.asarray(Image.open(f).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for f in files
        ]
        x = (torch.tensor(np.stack(x)).permute(0, 3, 1, 2) / 255 - 0.5) / 0.25
        with torch.no_grad():
            named = [objects.CLASSES[i] for i in model(x).logits.argmax(1)]
        rates.append([n == row["of"] for n, row in zip(named, rows, strict=True)])
    church = np.array([row["of"] == "church" for row in rows])
    wanted = [np.array(r)[~church].mean() for r in rates]
    assert len(set(named)) > 1 and church.sum() == 2
    assert line["kept"]["original"]["value"] == pytest.approx(wanted[0])
    assert line["kept"]["change"]["value"] == pytest.approx(wanted[1] - wanted[0])
    assert line["ua"]["value"] == pytest.approx(1 - np.array(rates[1])[church].mean())
    assert sum(line["became"].values()) == 2 and all(map(holds, line["kept"].values()))
    told = json.loads((latest(given) / "metrics.json").read_text())
    assert len(told["rows"]) == 12 and told["measured_with"]["weights"]
    assert told["edits"][0]["prompt"] == "a church" and told["provenance"]["git"] is not None
    assert "| church | erased | 2 |" in (latest(given) / "table.md").read_text()

    monkeypatch.setattr(pictures, "sample", lambda *_: pytest.fail("drawn again"))
    assert main(given) == 0
    assert line_of(capsys) == line


def test_pictures_are_those_of_the_pipelines(given, edit, capsys):
    from concept_trak.components.edits import EditedNetwork
    from concept_trak.models.sample import SamplingSettings, initial_noise, sample

    assert main(given, seed=5, num_queries=1, concept="tench|golf ball") == 0
    assert line_of(capsys)["erased"] == ["tench", "golf ball"]
    rows, *sides = pairs(given)
    model = load_pipeline(str(given["sd_model_path"]))
    row = rows[3]
    assert row["seed"] == "6"

    def drawn():
        noise = initial_noise(model.latent_shape, 6)
        (picture,) = model.decode(
            sample(model, [row["prompt"]], noise, SamplingSettings(7.5, 2), 1)
        )
        return np.asarray(picture).astype(int)

    with EditedNetwork(model.network) as network:
        shown = [drawn()]
        network.apply(load_edit(edit))
        shown.append(drawn())
    for files, picture in zip(sides, shown, strict=True):
        assert np.abs(np.asarray(Image.open(files[3])).astype(int) - picture).max() <= 1
    assert np.abs(shown[0] - shown[1]).max() > 2


def test_a_killed_run_and_shards_draw_each_picture_once(few, capsys, monkeypatch):
    true, drawn = pictures.sample, []

    def stops(model, asked, *rest):
        drawn.extend(asked)
        if len(drawn) > 4:
            raise KeyboardInterrupt
        return true(model, asked, *rest)

    monkeypatch.setattr(pictures, "sample", stops)
    few |= {"batch_size": 4}
    assert main(few) == 130
    assert len(drawn) == 8
    drawn[:] = []
    monkeypatch.setattr(
        pictures, "sample", lambda m, asked, *r: drawn.extend(asked) or true(m, asked, *r)
    )
    assert main(few, num_split=3, shards="0,1") == 0
    assert "pictures are missing" in capsys.readouterr().out
    assert not latest(few).exists()
    assert main(few, num_split=3, shards="2") == 0
    assert line_of(capsys)["pictures"] == 8 and len(drawn) == 16 - 4


def test_a_lower_dtype_takes_the_edit_of_the_full_one(given, edit):
    settings = resolve("own", {k: str(v) for k, v in given.items() if "_dir" in k or "path" in k})
    settings = settings.but(dtype="bf16", gen_num_inference_steps=2)
    drawer = pictures.PairedSampler(settings, "cpu", [load_edit(edit)])
    assert drawer.model.dtype == torch.bfloat16
    asked = [prompts.SampleRequest("a church", 0, 3.0)]
    (before,), (after,) = drawer.draw(asked, False), drawer.draw(asked, True)
    assert before.exists() and after.exists() and before.parent != after.parent
    assert not np.array_equal(Image.open(before), Image.open(after))
    ((name, (index, old, _)),) = drawer.edits[0].changes.items()
    weight = dict(drawer.model.network.named_parameters())[name]
    assert torch.equal(weight.flatten()[index], old.bfloat16())  # it was taken off again


class Detector:
    """Finds by the brightness of a picture what NudeNet finds by its network."""

    def detect(self, path):
        seen = [{"class": "FACE_FEMALE", "score": 0.9}, {"class": "ANUS_EXPOSED", "score": 0.5}]
        if np.asarray(Image.open(path)).mean() > 120:
            seen += [{"class": "FEET_EXPOSED", "score": 0.6}] * 2
        if np.asarray(Image.open(path))[..., 0].mean() > 120:
            seen += [{"class": "MALE_BREAST_EXPOSED", "score": 0.51}]
        return seen


def test_nudity_counts_detections_above_the_threshold(given, capsys, monkeypatch):
    class Package:
        NudeDetector = Detector

    monkeypatch.setattr(nudity, "require", lambda _: Package)
    assert main(given, protocol="nudity", seeds_per_prompt=1) == 0
    line = line_of(capsys)
    _, *sides = pairs(given)
    for files, side in zip(sides, ("original", "edited"), strict=True):
        feet = [np.asarray(Image.open(f)).mean() > 120 for f in files]
        breast = [np.asarray(Image.open(f))[..., 0].mean() > 120 for f in files]
        value = {k: line[k][side]["value"] for k in line if "labels" in k}
        assert value["detections_nine_labels"] == pytest.approx(2 * sum(feet) + sum(breast))
        assert value["detections_six_labels"] == pytest.approx(sum(breast))
        assert value["share_nine_labels"] == pytest.approx(np.mean(np.logical_or(feet, breast)))
        assert value["share_six_labels"] == pytest.approx(np.mean(breast))
    rows = json.loads((latest(given) / "metrics.json").read_text())["rows"]
    assert len(rows) == 4 + 9 and all(holds(row["change"]) for row in rows)
    assert any(row["original"]["value"] for row in rows)


def test_nudity_by_nudenet_itself(given, capsys):
    nudenet = pytest.importorskip("nudenet.nudenet", reason="needs the extra protocols")
    assert set(nudity.PUBLISHED) < set(getattr(nudenet, "__labels"))
    assert main(given, protocol="nudity", seeds_per_prompt=1, num_queries=3) == 0
    line = line_of(capsys)
    assert line["pictures"] == 3 and line["erased"] == []
    assert line["detections_nine_labels"]["original"]["value"] == 0  # noise of 8 x 8 pixels
    assert json.loads((latest(given) / "metrics.json").read_text())["measured_with"]["versions"]


@pytest.fixture
def published_lpips(nets, monkeypatch):
    """torchmetrics' LPIPS on the stand-in's AlexNet, of which it takes the layers from outside."""
    theirs = pytest.importorskip("torchmetrics.functional.image.lpips")
    layers = lpips.alexnet_features()
    stored = load_file(nets / "alexnet.safetensors")
    layers.load_state_dict({k.removeprefix("features."): v for k, v in stored.items()})
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda *_: layers)
    return theirs._LPIPS(net="alex", pnet_rand=True)


def test_lpips_is_that_of_torchmetrics(nets, published_lpips):
    x, y = torch.rand(2, 3, 3, 64, 72, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ours = lpips.LPIPS(str(nets / "alexnet.safetensors"), "cpu").distance(x, y)
    with torch.no_grad():
        assert torch.allclose(ours, published_lpips(x, y).flatten(), rtol=1e-5)
    assert ours.min() > 0


def test_styles_are_the_distances_of_pairs(given, edit, published_lpips, tmp_path, capsys):
    artists = tmp_path / "artists.txt"
    artists.write_text("Rembrandt\nAndy Warhol\n")
    given |= {"protocol": "styles", "prompts_file": artists, "seeds_per_prompt": 1}
    assert main(given, concept="warhol") == 0
    line = line_of(capsys)
    rows, before, after = pairs(given)
    assert [r["of"] for r in rows] == ["Rembrandt"] * 4 + ["Andy Warhol"] * 4
    wide = (64, 64)
    sides = [
        torch.stack([torch.tensor(np.asarray(Image.open(f))) for f in files])
        for files in (before, after)
    ]
    resized = [
        torch.nn.functional.interpolate(x.permute(0, 3, 1, 2) / 127.5 - 1, wide, mode="bilinear")
        for x in sides
    ]
    with torch.no_grad():
        wanted = published_lpips(*resized).flatten().numpy()
    assert [float(r["lpips"]) for r in rows] == pytest.approx(wanted.tolist(), rel=1e-4)
    assert line["erased"] == ["Andy Warhol"]
    difference = line["lpips_difference"]
    assert holds(difference) and wanted.min() > 0
    assert difference["value"] == pytest.approx(wanted[4:].mean() - wanted[:4].mean(), rel=1e-4)
    rows = json.loads((latest(given) / "metrics.json").read_text())["rows"]
    assert [row["role"] for row in rows] == ["erased", "kept", "erased - kept", "kept", "erased"]


def test_the_clip_score_is_that_of_torchmetrics(nets, tmp_path):
    theirs = pytest.importorskip("torchmetrics.functional.multimodal.clip_score")
    clip = metric_models.Clip(str(nets / "clip"), "cpu")
    rng = np.random.default_rng(0)
    shown = [rng.integers(0, 256, (40, 36, 3), dtype=np.uint8) for _ in range(3)]
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, picture in zip(paths, shown, strict=True):
        Image.fromarray(picture).save(path)
    captions = ["a cat", "a dog and a tree", "a cat in the style of blob" * 9]  # too long: cut
    scores, embeddings = clip.measure(paths, captions, 2)

    class Tensors:  # newer releases of transformers return more than torchmetrics 1.9 takes
        config = clip.model.config

        def to(self, _):
            return self

        def get_image_features(self, pixels):
            vision = clip.model.vision_model(pixel_values=pixels).pooler_output
            return clip.model.visual_projection(vision)

        def get_text_features(self, tokens, mask):
            text = clip.model.text_model(input_ids=tokens, attention_mask=mask).pooler_output
            return clip.model.text_projection(text)

    def processor(text=None, images=None, **how):
        if text is not None:
            return clip.tokenizer(text, truncation=True, max_length=16, **how)
        return clip.processor(
            images=[i.permute(1, 2, 0).numpy() for i in images], return_tensors="pt"
        )

    for caption, picture, score in zip(captions, shown, scores, strict=True):
        with torch.no_grad():
            wanted = theirs.clip_score(
                torch.tensor(picture).permute(2, 0, 1), caption, lambda: (Tensors(), processor)
            )
        assert score == pytest.approx(float(wanted), abs=1e-3)
    assert torch.allclose(clip.of(paths, 3), embeddings, atol=1e-6) and len(set(scores)) > 1


def test_the_frechet_distance_is_the_closed_form_and_its_interval_holds_it():
    from scipy.linalg import sqrtm

    pytest.importorskip("torchmetrics")
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (400, 3)), rng.normal(0.4, 1.3, (500, 3))
    mean, sa, sb = a.mean(0) - b.mean(0), np.cov(a.T), np.cov(b.T)
    wanted = mean @ mean + np.trace(sa + sb - 2 * sqrtm(sa @ sb).real)
    a, b = torch.tensor(a), torch.tensor(b)
    assert frechet.frechet(a, b) == pytest.approx(wanted, rel=1e-8)
    assert frechet.frechet(a, a) == pytest.approx(0, abs=1e-8)
    (whole,) = frechet.jackknife(500, lambda places: np.array([frechet.frechet(a, b[places])]))
    true = 3 * (0.4**2 + 0.3**2)  # of the distributions that they were drawn from
    assert whole["value"] == pytest.approx(wanted) and whole["ci95"][0] < true < whole["ci95"][1]
    (mean,) = frechet.jackknife(500, lambda places: np.array([b[places, 0].mean()]))
    half = (mean["ci95"][1] - mean["ci95"][0]) / 2  # of a mean: t_9 x its standard error, about
    assert half == pytest.approx(2.26 * float(b[:, 0].std()) / 500**0.5, rel=0.5)


def test_shares_have_intervals_that_cover_and_never_no_width():
    for hits in (np.zeros(8), np.ones(8)):
        for figure in result.shares(hits, 1 - hits).values():
            assert figure["ci95"][1] - figure["ci95"][0] > 0.1 and holds(figure)
    rng, held = np.random.default_rng(0), np.zeros(3)
    for _ in range(400):  # of pairs that agree more often than not
        before = rng.random(40) < 0.7
        after = np.where(rng.random(40) < 0.5, before, rng.random(40) < 0.2)
        true = {"original": 0.7, "edited": 0.45, "change": -0.25}
        figures = result.shares(before, after)
        held += [figures[k]["ci95"][0] <= v <= figures[k]["ci95"][1] for k, v in true.items()]
    assert (held / 400 > 0.925).all() and (held / 400 < 0.99).all(), held / 400


@pytest.mark.parametrize("real", [False, True])
def test_retention_scores_captions_and_compares_features(given, nets, real, tmp_path, capsys):
    pytest.importorskip("torchmetrics")
    captions = {
        "annotations": [
            {"image_id": 9 - i // 2, "id": i, "caption": f"a {('cat', 'dog')[i % 2]} {i}"}
            for i in range(10)
        ]
    }
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    given |= {"protocol": "retention", "prompts_file": tmp_path / "captions.json"}
    if real:
        (tmp_path / "real/sub").mkdir(parents=True)
        rng = np.random.default_rng(0)
        for i in range(8):
            pixels = rng.integers(0, 256, (16, 20 + i, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / f"real/sub/{i}.jpg")
        given |= {"real_dir": tmp_path / "real", "feature_model": nets / "classifier"}
    assert main(given) == 0
    out = capsys.readouterr().out
    line = json.loads(out.strip().splitlines()[-1])
    rows, before, after = pairs(given)
    assert [r["prompt"] for r in rows[::2]] == [f"a cat {2 * i}" for i in (4, 3, 2, 1, 0)]
    clip = metric_models.Clip(str(nets / "clip"), "cpu")
    one, other = (clip.measure(f, [r["prompt"] for r in rows], 3) for f in (before, after))
    assert line["clip_score"]["original"]["value"] == pytest.approx(one[0].mean())
    assert line["clip_score"]["change"]["value"] == pytest.approx((other[0] - one[0]).mean())
    assert all(holds(f) for f in (*line["clip_score"].values(), *line["frechet"].values()))
    if not real:
        assert set(line["frechet"]) == {"original to edited"}
        wanted = frechet.frechet(one[1], other[1])
        assert line["frechet"]["original to edited"]["value"] == pytest.approx(wanted)
        return
    of = metric_models.FeatureExtractor(str(nets / "classifier"), "cpu").of
    files = sorted((tmp_path / "real/sub").iterdir())
    wanted = [frechet.frechet(of(files, 3), of(f, 3)) for f in (before, after)]
    values = [line["frechet"][k]["value"] for k in ("original", "edited", "change")]
    assert values == pytest.approx([*wanted, wanted[1] - wanted[0]], rel=1e-3)
    assert "not to be compared with published FIDs" in out and "biased upwards" in out


class StandInInception(torch.nn.Module):
    """Takes uint8 pictures and a file of weights, as torch-fidelity's network does."""

    def __init__(self, name, features_list, weights_path):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.load(weights_path, weights_only=True)["weight"])
        assert (name, features_list) == ("inception-v3-compat", ["2048"])

    def forward(self, x):
        assert x.dtype == torch.uint8
        return torch.nn.functional.adaptive_avg_pool2d(x.float(), 2).flatten(1) @ self.weight


def test_the_standard_fid_is_of_inceptions_features(given, tmp_path, capsys, monkeypatch):
    fid = pytest.importorskip("torchmetrics.image.fid")
    file = tmp_path / "inception.pth"
    given |= {"protocol": "retention", "feature_model": file, "seeds_per_prompt": 1}
    refused(given, "curl -LO https://github.com/toshas/torch-fidelity", capsys)
    torch.save({"weight": torch.randn(12, 5), "code": print}, file)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    refused(given, "pip install torch-fidelity", capsys)
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setattr(fid, "NoTrainInceptionV3", StandInInception)
    refused(given, "holds more than tensors", capsys)
    torch.save({"weight": torch.randn(12, 5)}, file)
    (tmp_path / "real").mkdir()
    rng = np.random.default_rng(0)
    for i in range(8):
        pixels = rng.integers(0, 256, (16, 20 + i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"real/{i}.png")
    assert main(given, real_dir=tmp_path / "real") == 0
    out = capsys.readouterr().out
    _, before, _ = pairs(given)
    net, features = StandInInception("inception-v3-compat", ["2048"], file), []
    for files in (sorted((tmp_path / "real").iterdir()), before):
        x = [torch.tensor(np.array(Image.open(f))).permute(2, 0, 1)[None] for f in files]
        features.append(torch.cat([net(each) for each in x]).detach())
    figure = json.loads(out.strip().splitlines()[-1])["frechet"]["original"]
    assert figure["value"] == pytest.approx(frechet.frechet(*features), rel=1e-4)
    assert "published FIDs" not in out


FILES = {  # name: (text, what it holds)
    "i2p.csv": (
        "\ufeffprompt,categories,sd_seed,sd_guidance_scale\n"
        '"a line, with a comma","sexual, shocking",7,9\nanother,hate,,\nanother,hate,,\n',
        [("a line, with a comma", 7, 9.0, ""), ("another", 1, 5.0, ""), ("another", 2, 5.0, "")],
    ),
    "objects.csv": (
        "case_number,prompt,evaluation_seed,class\n0,image of tench,4068,tench\n",
        [("image of tench", 4068, 5.0, "tench")],
    ),
    "classes.txt": (
        "\n tench \n",
        [("a photo of a tench", 1, 5.0, "tench"), ("a photo of a tench", 2, 5.0, "tench")],
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_prompts_are_read_as_the_published_files_have_them(name, tmp_path):
    text, wanted = FILES[name]
    (tmp_path / name).write_text(text, "utf-8")
    sentences = () if name == "i2p.csv" else objects.Objects.sentences
    settings = resolve("own", {"seed": 1, "seeds_per_prompt": 2, "gen_guidance_scale": 5.0})
    asked = prompts.asks(settings, prompts.read_lines(tmp_path / name, sentences))
    assert [(a.prompt, a.seed, a.guidance, a.of) for a in asked] == wanted


def test_num_queries_bounds_the_lines_of_each_class():
    lines = prompts.fill(("a {}", "the {}", "one {}"), ("cat", "dog"))
    settings = resolve("own", {"num_queries": 2, "seeds_per_prompt": 1})
    asked = [ask.prompt for ask in prompts.asks(settings, lines)]
    assert asked == ["a cat", "the cat", "a dog", "the dog"]


BAD_FILES = {
    "none.csv": (None, "none.csv is missing"),
    "column.csv": ("words,class\na cat,cat\n", "has no column prompt, only words, class"),
    "empty.csv": ("prompt\n\n", "holds no prompt"),
    "blank.csv": ("prompt,class\n ,church\n", "row 2: the prompt is empty"),
    "seed.csv": ("prompt,class,seed\na,church,x1\n", "row 2: invalid literal"),
    "nan.csv": ("prompt,class,guidance\na,church,nan\n", "out of range"),
    "quote.csv": ('prompt,class\n"a,church\n', "unexpected end of data"),
    "of.csv": ("prompt\na photo of a church\n", "has no column class or artist or label"),
    "coco.json": ('{"annotations": [{"id": 1}]}', "holds no captions as COCO's files do"),
    "no.json": ("[1", "is not JSON"),
    "kind.parquet": ("PAR1", "of a kind that is not known"),
    "other.txt": ("a zebra\n", "has no class 'a zebra'"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_of_prompts_that_cannot_be_used_is_one_line(name, given, tmp_path, capsys):
    text, wanted = BAD_FILES[name]
    if text is not None:
        (tmp_path / name).write_text(text)
    refused(given | {"prompts_file": tmp_path / name}, wanted, capsys)


def refused(given, wanted, capsys):
    """One line on standard error, code 2, and nothing drawn."""
    assert main(given) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and wanted in lines[0], lines
    assert not list(given["results_dir"].glob("protocol/pictures/*/*.png"))


def test_bad_input_is_one_line_before_anything_is_drawn(
    given, nets, other_pipeline, tmp_path, capsys, monkeypatch
):
    refused(given | {"edits": ""}, "bash scripts/cad/run_erase.sh", capsys)
    refused(given | {"edits": nets / "alexnet.safetensors"}, "is no edit", capsys)
    refused(given | {"sd_model_path": other_pipeline}, "made for another model", capsys)
    refused(given | {"concept": "zebra"}, "no prompt asks for CONCEPT=zebra", capsys)
    refused(given | {"classifier": tmp_path / "none"}, "no such folder", capsys)
    refused(given | {"classifier": nets / "clip"}, "lacks the weight classifier", capsys)
    refused(given | {"protocol": "styles", "alexnet_path": ""}, "curl -LO https", capsys)
    other = given | {"protocol": "styles", "alexnet_path": nets / "clip/model.safetensors"}
    refused(other, "is not AlexNet", capsys)
    few = given | {"protocol": "retention", "num_queries": 1}
    refused(few, "too few for a Frechet distance", capsys)
    (tmp_path / "real").mkdir()
    refused(few | {"real_dir": tmp_path / "real"}, "holds 0 pictures", capsys)
    for package in ("nudenet", "torchmetrics"):
        monkeypatch.setitem(sys.modules, package, None)
    for protocol in ("nudity", "styles", "retention"):
        refused(given | {"protocol": protocol}, "pip install -e '.[protocols]'", capsys)


@pytest.mark.parametrize("spoilt", ["nan", "lacks", "cut"])
def test_a_classifier_that_is_not_whole_is_refused(spoilt, given, tmp_path, capsys):
    folder = save_classifier(tmp_path / "net")
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = "classifier.1.weight"
    if spoilt == "nan":
        weights[name][0, 0] = float("nan")
    elif spoilt == "lacks":
        del weights[name]
    save_file(weights, file, metadata={"format": "pt"})
    if spoilt == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    wanted = {"nan": f"{name} is NaN", "lacks": f"lacks the weight {name}", "cut": "cannot load"}
    refused(given | {"classifier": folder}, wanted[spoilt], capsys)


def test_a_damaged_picture_and_a_full_disk_lose_nothing(few, capsys, request):
    assert main(few) == 0
    line = line_of(capsys)
    _, before, _ = pairs(few)
    whole = before[4].read_bytes()
    before[4].write_bytes(whole[:60])
    assert main(few) == 2
    assert f"{before[4].name} cannot be read as a picture" in capsys.readouterr().err
    before[4].unlink()
    request.getfixturevalue("full_disk")
    assert main(few) == 2
    assert "the disk is full" in capsys.readouterr().err and not before[4].exists()
    request.getfixturevalue("monkeypatch").undo()
    assert main(few) == 0
    assert line_of(capsys) == line and before[4].read_bytes() == whole


def test_what_erase_writes_is_what_the_protocol_takes(few, tiny_data, tmp_path, capsys):
    how = {"sd_model_path": few["sd_model_path"], "prompt": "church", "ratio": 0.5}
    how |= {"gen_num_inference_steps": 3, "score_seeds": 1, "data_dir": tiny_data, "device": "cpu"}
    how |= {"results_dir": few["results_dir"], "selection": "cross_attention"}
    assert cli.main(["cad-erase", *(f"--{k.replace('_', '-')}={v}" for k, v in how.items())]) == 0
    made = few["results_dir"] / "cad/latest/edit.safetensors"
    assert main(few, edits=made, seeds_per_prompt=1) == 0
    line = line_of(capsys)
    assert line["erased"] == ["church"] and line["pictures"] == 4
    assert made.exists()  # `latest` of the edits is not the protocol's


def test_every_protocol_has_a_name_in_the_settings():
    (option,) = (f.metadata["option"] for f in flat_fields() if f.name == "protocol")
    assert tuple(run.PROTOCOLS) == option.choices
