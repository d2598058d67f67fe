"""Textual Inversion: what is learned, what stays as it is, resume, files and their mistakes."""

import copy
import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from concept_trak import cli
from concept_trak.datasets.image_folder import read_images
from concept_trak.errors import UserError
from concept_trak.models.learned_tokens import load_token
from concept_trak.models.text_to_image import load_pipeline
from concept_trak.settings import TOKEN
from experiments.training import textual_inversion
from experiments.training.loop import step_generator
from experiments.training.textual_inversion import (
    InversionBatch,
    encode,
    init_word_of,
    prompt_ids,
    token_loss,
    train_token,
)
from experiments.training.token_settings import TokenSettings

PROMPT = f"a picture in the style of {TOKEN}"
QUICK = TokenSettings(steps=12, lr=0.05, init_word="blob")


@pytest.fixture
def model(tiny_model):
    return copy.deepcopy(tiny_model)


@pytest.fixture(scope="module")
def images(tiny_data):
    return [tiny_data / f"{style}-cat.png" for style in ("line", "flat")]


def weights(model):
    parts = {"unet": model.pipe.unet, "text": model.pipe.text_encoder, "vae": model.pipe.vae}
    return {
        f"{part}.{n}": v.clone() for part, m in parts.items() for n, v in m.state_dict().items()
    }


@pytest.fixture(scope="module")
def trained(tiny_model, images, tmp_path_factory):
    """(model, its weights before, path of the token) of one uninterrupted run."""
    model = copy.deepcopy(tiny_model)
    before = weights(model)
    return (
        model,
        before,
        train_token(model, images, tmp_path_factory.mktemp("token"), prompt=PROMPT, settings=QUICK),
    )


# training


def test_training_lowers_the_loss(model, images, tmp_path):
    """The network predicts v from x0 = D(text): the random UNet of the tiny pipeline hardly listens
    to its prompt.
    """
    for name, p in model.pipe.text_encoder.named_parameters():
        if "layers" in name:
            p /= 30  # conftest's large weights make nearly a step function of the text encoder
    model.schedule.prediction, data = "v_prediction", read_images(images[:1], PROMPT)
    latents, decode = (
        encode(model, data, False),
        torch.randn(16 * 6, 32, generator=torch.Generator().manual_seed(0)) / 3,
    )
    model._call = lambda network, x_t, t, cond: (
        -(1 - model.schedule.alpha_bar[t]).float().sqrt().view(-1, 1, 1, 1)
        * (cond.embeddings.flatten(1) @ decode).view_as(x_t)
    )

    def loss(row):
        ids = prompt_ids(model, PROMPT, model.add_token(TOKEN, row))
        lesson = InversionBatch(model, latents, ids, TokenSettings(batch_size=32, seed=9))
        with torch.no_grad():
            return sum(token_loss(lesson, step).item() for step in range(5)) / 5

    before = loss(textual_inversion.initial_embedding(model, "blob")[0])
    path = train_token(
        model,
        images[:1],
        tmp_path,
        prompt=PROMPT,
        settings=TokenSettings(steps=60, lr=0.05, init_word="blob"),
    )
    assert loss(load_file(path)[TOKEN]) < 0.9 * before


def test_every_other_weight_stays_bit_identical(trained):
    model, before, path = trained
    after = weights(model)
    name = next(n for n in after if n.endswith("token_embedding.weight"))
    assert after.keys() == before.keys()
    assert after[name].shape[0] == before[name].shape[0] + 1
    after[name] = after[name][:-1]
    assert all(torch.equal(after[n], before[n]) for n in before)
    assert not any(p.requires_grad for p in model.pipe.text_encoder.parameters())
    assert not model.pipe.text_encoder.get_input_embeddings()._forward_hooks


def test_a_trained_token_loads_to_the_same_encoding_in_another_model(trained, model):
    other, _, path = trained
    base = model.encode_prompts(["a cat in the style of blob"]).embeddings
    load_token(model, path)
    mine, theirs = (m.encode_prompts([PROMPT]).embeddings for m in (model, other))
    assert torch.equal(mine, theirs)
    assert torch.equal(model.encode_prompts(["a cat in the style of blob"]).embeddings, base)
    assert model.tokens == other.tokens and load_file(path)[TOKEN].shape == (6,)
    assert not torch.equal(
        load_file(path)[TOKEN], textual_inversion.initial_embedding(model, "blob")[0]
    )


def test_a_killed_run_resumes_to_the_same_bytes(
    trained, model, tiny_model, images, tmp_path, monkeypatch
):
    monkeypatch.setattr(textual_inversion, "SAVE_EVERY", 5)
    loss = textual_inversion.token_loss

    def killed(lesson, step):
        if step == 8:
            raise KeyboardInterrupt
        return loss(lesson, step)

    monkeypatch.setattr(textual_inversion, "token_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        train_token(model, images, tmp_path, prompt=PROMPT, settings=QUICK)
    steps = []
    monkeypatch.setattr(textual_inversion, "token_loss", lambda *a: steps.append(a[-1]) or loss(*a))
    path = train_token(copy.deepcopy(tiny_model), images, tmp_path, prompt=PROMPT, settings=QUICK)
    assert steps == list(range(5, 12)) and path.read_bytes() == trained[2].read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["new1.json", "new1.safetensors"]
    assert json.loads((tmp_path / "new1.json").read_text()) == json.loads(
        trained[2].with_suffix(".json").read_text()
    )


def test_a_checkpoint_of_other_settings_is_refused(model, images, tmp_path, monkeypatch):
    monkeypatch.setattr(textual_inversion, "SAVE_EVERY", 1)
    monkeypatch.setattr(
        textual_inversion, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        train_token(model, images, tmp_path, prompt=PROMPT, settings=TokenSettings(steps=2))
    with pytest.raises(UserError, match="another lr"):
        train_token(model, images, tmp_path, prompt=PROMPT, settings=TokenSettings(steps=2, lr=1.0))
    (tmp_path / "new1.checkpoint.safetensors").write_bytes(b"cut")
    with pytest.raises(
        UserError, match="not a safetensors file.*remove it and run the same again: rm "
    ):
        train_token(model, images, tmp_path, prompt=PROMPT, settings=TokenSettings(steps=2))


def test_a_finished_run_is_loaded_and_another_is_not_overwritten(
    trained, model, images, monkeypatch
):
    monkeypatch.setattr(textual_inversion, "fit", None)
    folder = trained[2].parent
    assert train_token(model, images, folder, prompt=PROMPT, settings=QUICK) == trained[2]
    assert model.tokens == trained[0].tokens
    with pytest.raises(UserError, match="another pictures"):
        train_token(model, images[:1], folder, prompt=PROMPT, settings=QUICK)


def test_the_record_says_what_made_the_token(trained):
    record = json.loads(trained[2].with_suffix(".json").read_text())
    assert (
        record["identity"]["prompt"] == PROMPT
        and record["identity"]["lr"] == 0.05
        and record["identity"]["init_token"] == "blob</w>"
    )
    assert (
        record["identity"]["model"] == trained[0].identity()
        and record["images"] == 2
        and "versions" in record["provenance"]
    )


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_a_network_that_knows_the_answer_has_no_loss(model, images, prediction):
    """One picture: eps is what x_t has beside x0, and v = sqrt(a) eps - sqrt(1 - a) x0."""
    latents = encode(model, read_images(images[:1], PROMPT), False)

    def oracle(network, x_t, t, cond):
        a = model.schedule.alpha_bar[t].float().view(-1, 1, 1, 1)
        eps = (x_t - a.sqrt() * latents[0]) / (1 - a).sqrt()
        return eps if prediction == "epsilon" else a.sqrt() * eps - (1 - a).sqrt() * latents[0]

    model.schedule.prediction, model._call = prediction, oracle
    ids = prompt_ids(model, "a cat", model.pipe.tokenizer.eos_token_id)
    assert token_loss(InversionBatch(model, latents, ids, TokenSettings()), 0) < 1e-6


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_equals_a_loop_over_the_batch(model, images, prediction):
    """Each picture by itself, noised by the pipeline's own scheduler, in double precision."""
    settings, step = TokenSettings(seed=3, batch_size=5), 7
    model.schedule.prediction = prediction
    latents = encode(model, read_images(images, PROMPT), True)
    ids = prompt_ids(model, "a cat", model.pipe.tokenizer.eos_token_id)
    got = token_loss(InversionBatch(model, latents, ids, settings), step)
    g = step_generator(settings.seed, step)
    picture, version = (torch.randint(2, (5,), generator=g).tolist() for _ in range(2))
    levels = torch.randint(1000, (5,), generator=g)
    noise = torch.randn(5, 2, 4, 4, generator=g).double()
    scheduler, network = model.pipe.scheduler, copy.deepcopy(model.network).double()
    text, losses = model.pipe.text_encoder(ids)[0].double(), []
    for i in range(5):
        x0, t = latents[picture[i], version[i]][None].double(), levels[i : i + 1]
        x_t = scheduler.add_noise(x0, noise[i : i + 1], t)
        y = noise[i] if prediction == "epsilon" else scheduler.get_velocity(x0, noise[i : i + 1], t)
        with torch.no_grad():
            losses.append((network(x_t, t, text).sample - y).square().mean())
    assert len(set(picture)) == len(set(version)) == 2
    torch.testing.assert_close(got.double(), torch.stack(losses).mean(), rtol=1e-4, atol=0)


def test_mirror_images_are_used_only_if_asked_for(model, images):
    data = read_images(images, PROMPT)
    plain, both = encode(model, data, False), encode(model, data, True)
    assert plain.shape == (2, 1, 2, 4, 4) and both.shape == (2, 2, 2, 4, 4)
    assert torch.equal(both[:, :1], plain)
    mirrored = model.encode_images(data.images([0], size=8)[:, :, ::-1])
    torch.testing.assert_close(both[0, 1], mirrored[0])


def test_the_start_is_the_first_token_of_the_word(model):
    assert textual_inversion.initial_embedding(model, "blob cat")[1] == "blob</w>"
    assert init_word_of("A picture in the style of <new1> art", TOKEN) == "art"
    assert init_word_of("<new1> golden retriever", TOKEN) == "golden retriever"
    assert init_word_of("a painting by <new1>", TOKEN) == "art"
    with pytest.raises(UserError, match="init-word"):
        textual_inversion.initial_embedding(model, " ")


def test_inputs_that_cannot_be_trained_on_are_refused(model, images, tmp_path, tiny_pipeline):
    cases = {
        "must hold the token": {"prompt": "a cat"},
        "one word": {"prompt": "a < >", "token": "< >"},
        "beyond": {"prompt": "cat " * 40 + TOKEN},
    }
    for words, options in cases.items():
        with pytest.raises(UserError, match=words):
            train_token(model, images, tmp_path, **options)
    with pytest.raises(UserError, match="does not exist"):
        train_token(model, [tmp_path / "missing.png"], tmp_path)
    with pytest.raises(UserError, match="no picture"):
        train_token(model, [tmp_path], tmp_path)
    with pytest.raises(UserError, match="fp32"):
        train_token(load_pipeline(str(tiny_pipeline), dtype="fp16"), images, tmp_path)
    with pytest.raises(UserError, match="lr"):
        TokenSettings(lr=float("nan"))


def test_a_loss_that_is_not_finite_is_refused(model, images, tmp_path):
    model._call = lambda network, x_t, t, cond: x_t * float("nan") + cond.embeddings.sum()
    with pytest.raises(UserError, match="step 0"):
        train_token(model, images, tmp_path, prompt=PROMPT, settings=QUICK)


# loading


def test_public_layouts_are_read(model, tmp_path):
    row = torch.randn(6)
    torch.save({TOKEN: row}, tmp_path / "new1.bin")
    torch.save({"<other>": torch.nn.Parameter(row[None].half())}, tmp_path / "diffusers.bin")
    save_file({TOKEN: row}, tmp_path / "new1.safetensors")
    encoded = []
    for name in ("new1.bin", "diffusers.bin", "new1.safetensors"):
        load_token(model, tmp_path / name)
        encoded.append(model.encode_prompts([PROMPT]).embeddings)
    assert torch.equal(encoded[0], encoded[2])
    torch.testing.assert_close(encoded[1], encoded[0], rtol=1e-2, atol=1e-2)
    assert list(model.tokens) == [
        TOKEN
    ] and model.pipe.text_encoder.get_input_embeddings().num_embeddings == len(model.pipe.tokenizer)


@pytest.mark.parametrize(
    "name, content",
    [
        ("learned_embeds.bin", lambda rows: {"<duck>": rows}),
        ("duck.safetensors", lambda rows: {"emb_params": rows}),
        (
            "two.SAFETENSORS",
            lambda rows: {f"<d>{'_' * (i > 0)}{i or ''}": r.clone() for i, r in enumerate(rows)},
        ),
        (
            "duck.pt",
            lambda rows: {"string_to_token": {"*": 265}, "string_to_param": {"*": rows}, "step": 9},
        ),
    ],
)
def test_several_vectors_are_read_one_after_another_as_in_diffusers(
    model, tiny_pipeline, tmp_path, name, content
):
    rows, words = torch.randn(3, 6), [f"a {TOKEN} cat", "a cat"]
    save = save_file if name.lower().endswith("safetensors") else torch.save
    save(content(rows), tmp_path / name)
    before = model.encode_prompts(words[1:]).embeddings
    load_token(model, tmp_path / name)
    pipe = load_pipeline(str(tiny_pipeline)).pipe
    pipe.load_textual_inversion({TOKEN: rows}, token=TOKEN)
    ids = pipe.tokenizer(
        [pipe.maybe_convert_prompt(text, pipe.tokenizer) for text in words],
        padding="max_length",
        return_tensors="pt",
    ).input_ids
    got = model.encode_prompts(words).embeddings
    torch.testing.assert_close(got, pipe.text_encoder(ids)[0], rtol=1e-4, atol=1e-5)
    assert torch.equal(got[1:], before) and list(model.tokens) == [TOKEN]
    long = f"a {TOKEN} " + "cat " * 20
    room = len(model.pipe.tokenizer("cat " * 20, truncation=True).input_ids) - 2
    assert len(model.lost_words(long).split()) == 20 + 1 + 3 - room
    load_token(model, save_one(tmp_path / "one.safetensors", rows[0]))  # and replaced by one
    assert model.read_as(words[0]) == words[0]
    assert not torch.equal(model.encode_prompts(words[:1]).embeddings, got[:1])


def save_one(path, row):
    save_file({TOKEN: row.clone()}, path)
    return path


def test_a_token_is_one_word_wherever_it_stands(model):
    number = model.add_token(TOKEN, torch.randn(6))
    ids = model.pipe.tokenizer(
        [f"a {TOKEN} cat", f"cat, {TOKEN}."], add_special_tokens=False
    ).input_ids
    assert [i.count(number) for i in ids] == [1, 1]
    cat = model.pipe.tokenizer("cat", add_special_tokens=False).input_ids
    assert ids[0][-1:] == cat


class Code:
    def __reduce__(self):
        return os.system, ("touch ran",)


def test_files_that_do_not_fit_are_refused_in_one_line(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    contents = {
        "wide.bin": ({TOKEN: torch.zeros(7)}, r"\[7\].*\[6\]"),
        "nan.bin": ({TOKEN: torch.full((6,), float("nan"))}, "NaN"),
        "several.bin": ({TOKEN: torch.zeros(6), "<new2>": torch.zeros(6)}, "2 entries"),
        "sdxl.bin": ({"clip_l": torch.zeros(2, 6), "clip_g": torch.zeros(2, 8)}, "clip_l, clip_g"),
        "apart.bin": ({"<a>": torch.zeros(6), "<a>_2": torch.zeros(6)}, "2 entries"),
        "webui.pt": ({"string_to_param": {"*": "x"}}, "instead of one"),
        "none.pt": ({"string_to_param": {}}, "instead of one"),
        "many.bin": ({TOKEN: torch.zeros(99, 6)}, r"\[99, 6\]"),
        "list.bin": ([torch.zeros(6)], "instead of one embedding"),
        "text.bin": ({TOKEN: "embedding"}, "instead of one"),
        "code.bin": ({TOKEN: Code()}, "more than tensors"),
    }
    for name, (content, _) in contents.items():
        torch.save(content, name)
    (tmp_path / "plain.bin").write_bytes(pickle.dumps({TOKEN: Code()}))
    (tmp_path / "cut.bin").write_bytes((tmp_path / "wide.bin").read_bytes()[:200])
    (tmp_path / "cut.safetensors").write_bytes(b"12")
    words = {name: text for name, (_, text) in contents.items()}
    words |= {
        "plain.bin": "more than tensors",
        "cut.bin": "damaged",
        "cut.safetensors": "not a safetensors",
        "none.bin": "does not exist",
    }
    for name, text in words.items():
        with pytest.raises(UserError, match=text) as caught:
            load_token(model, tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists() and not model.tokens


def test_a_word_of_the_model_is_no_token(model):
    word = model.pipe.tokenizer.convert_ids_to_tokens(300)
    with pytest.raises(UserError, match="already"):
        model.add_token(word, torch.zeros(6))


# identity


def test_tokens_have_an_identity_of_their_own_beside_the_weight_hash(model, tiny_model):
    model.add_token(TOKEN, torch.ones(6))
    first = dict(model.tokens)
    model.add_token(TOKEN, torch.zeros(6))
    assert model.weight_hash() == tiny_model.weight_hash() and tiny_model.tokens == {}
    assert first.keys() == model.tokens.keys() and first != model.tokens and len(first[TOKEN]) == 64


# command line


def test_train_token_verb(tiny_pipeline, images, tmp_path, capsys):
    flags = [
        "train-token",
        "--images",
        *map(str, images),
        "--prompt",
        PROMPT,
        "--sd-model-path",
        str(tiny_pipeline),
        "--out-dir",
        str(tmp_path),
        "--steps",
        "2",
        "--device",
        "cpu",
        "--init-word",
        "blob",
    ]
    assert cli.main(flags) == 0 and "new1.safetensors: <new1>" in capsys.readouterr().out
    assert (
        cli.main([*flags[:1], *flags[4:]]) == 2 and len(capsys.readouterr().err.splitlines()) == 1
    )
    assert (
        cli.main([*flags, "--learning-rate", "0.1"]) == 2
        and "another lr" in capsys.readouterr().err
    )


def test_without_pictures_the_tokens_of_the_tasks_are_learned_where_tasks_look_for_them(
    tiny_pipeline, images, tmp_path
):
    from concept_trak.settings import resolve
    from experiments.abc.evaluate import token_path
    from experiments.abc.tasks import read_tasks

    data = tmp_path / "data"
    (data / "json").mkdir(parents=True)
    (data / "one.png").write_bytes(images[0].read_bytes())
    (data / "json" / "test_artchive.json").write_text(
        json.dumps([{"exemplar": ["dataset/one.png"]}])
    )
    task = {
        "synth_image_path": "synth/00000.png",
        "prompt": PROMPT,
        "test_case": "test_artchive",
        "test_case_ind": 0,
        "model_path": "models/artchive/african",
        "train_prompt": PROMPT,
        "category": "art",
    }
    (tmp_path / "tasks.json").write_text(
        json.dumps([task, {**task, "prompt": f"a cat by {TOKEN}"}])
    )
    given = {
        "data_dir": str(data),
        "task_json": str(tmp_path / "tasks.json"),
        "sd_model_path": str(tiny_pipeline),
        "task_idx": "0-1",
    }
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in given.items()]
    assert cli.main(["train-token", "--benchmark=abc", *flags, "--steps=2", "--device=cpu"]) == 0
    found = token_path(resolve("abc", given), read_tasks(tmp_path / "tasks.json")[0])
    assert found.name == "new1.safetensors" and load_file(found)[TOKEN].shape == (6,)
