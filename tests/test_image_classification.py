"""Runs of the family of images: round trips, what a batch holds, predict, evaluate, merge, the card, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import peft
import pytest
import torch
import transformers
from PIL import Image

import ptft_hf
from ptft_hf import inference, recipes, tasks
from ptft_hf.errors import AdapterError, DataError, ModelError, RecipeError
from ptft_hf.models.images import DEFAULT_SIZE, default_processor
from ptft_hf.recipes import ImageClassificationRecipe
from tests.commands import Ptft, answers, ptft  # noqa: F401
from tests.runs import curve
from tests.test_data_images import folder_of_images
from tests.test_model_card import card_of, code_of, result_of
from tests.tiny_images import DARK, LIGHT, SIZES, make_image_checkpoint, pictures, splits

# PEFT asks a transformers model for an attribute that was renamed.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # Loaded by PEFT alone: false alarms, which our path keeps to itself.
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match:RuntimeWarning"),
]

FAST = {("resnet", "full/default"), ("resnet", "lora/r16_all_linear")}
CELLS = [
    *(("vit", method) for method in ("lora/r8_attention", "lora/dora", "vera/r256", "ln_tuning/default")),
    *(("vit", method) for method in ("adalora/r12_to_8", "oft/block32", "bottleneck/pfeiffer")),
    *((name, method) for name in ("vit", "resnet") for method in ("partial/top_2_layers", "partial/bias_only")),
    *((name, method) for name in SIZES for method in ("full/default", "lora/r16_all_linear")),
]


@pytest.fixture(scope="session")
def images_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("image_checkpoints")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            make_image_checkpoint(name, root / name)
        return root / name

    return folder


def recipe(**fields: Any) -> ImageClassificationRecipe:
    return ImageClassificationRecipe(name="test", family="image_classification", **fields)


def run(base: Path, method: Any, output: Path, data: Any = None, fields: Any = None, **settings: Any) -> Any:
    quick = {"max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 0.01, "warmup_steps": 0}
    return ptft_hf.train(
        model=str(base),
        task=recipe(**(fields or {})),
        adapter=method,
        output_dir=output,
        data=data or splits(),
        settings={**quick, **settings},
    )


# ---- round trips ----


@pytest.mark.parametrize(
    ("architecture", "method"),
    [pytest.param(*cell, marks=() if cell in FAST else pytest.mark.slow) for cell in CELLS],
)
def test_what_is_saved_is_what_was_trained(
    architecture: str, method: str, images_of: Callable[[str], Path], tmp_path: Path
) -> None:
    base, output = images_of(architecture), tmp_path / "run"
    if (architecture, method) == ("mobilenet_v2", "lora/r16_all_linear"):
        with pytest.raises(AdapterError, match="pads as TensorFlow does"):
            run(base, method, output)
        return
    trained = run(base, method, output)
    assert trained.run["proof"] == {"max_difference": 0.0, "examples": 8}
    shown = pictures(3, 9)["image"][:]
    pixels = trained.tokenizer(shown, return_tensors="pt")
    with torch.no_grad():
        expected = trained.model(**pixels).logits
        assert torch.equal(ptft_hf.load(output).model(**pixels).logits, expected)
        if method != "bottleneck/pfeiffer":
            assert torch.equal(load_plainly(output, base)(**pixels).logits, expected)
    assert expected.shape == (3, 2)
    if architecture != "mobilevit":  # so deep a network of random weights gives the same for all
        assert not torch.equal(expected[0], expected[1])
    found = trained.predict(shown)
    assert [set(answer["scores"]) for answer in found] == [{DARK, LIGHT}] * 3


def load_plainly(folder: Path, base: Path) -> Any:
    """By ``transformers`` and ``peft`` alone."""
    auto = transformers.AutoModelForImageClassification
    if not (folder / "adapter_config.json").exists():
        return auto.from_pretrained(folder, dtype=torch.float32).eval()
    config = transformers.AutoConfig.from_pretrained(folder)
    model = auto.from_pretrained(base, config=config, dtype=torch.float32)
    return peft.PeftModel.from_pretrained(model, folder).eval()


def test_the_matrix_is_as_wide_as_promised() -> None:
    assert len(SIZES) >= 8
    assert set(CELLS) >= FAST


@pytest.mark.parametrize("architecture", ["vit", pytest.param("resnet", marks=pytest.mark.slow)])
def test_a_model_of_random_weights_is_trained_saved_and_trained_further(architecture: str, tmp_path: Path) -> None:
    sizes = {f"model.{name}": value for name, value in SIZES[architecture].items()}
    scratch: Any = f"config:{architecture}"
    first = run(scratch, "full/default", tmp_path / "first", **sizes)
    assert first.run["proof"]["max_difference"] == 0.0
    assert "the weights are random: nothing is pretrained" in first.run["notes"]
    side = SIZES[architecture].get("image_size", DEFAULT_SIZE)
    assert dict(first.tokenizer.size) == {"height": side, "width": side}
    further = run(tmp_path / "first", "partial/head_only", tmp_path / "further")
    assert further.predict(pictures(2, 9)["image"][:])
    with pytest.raises(RecipeError, match=f"{scratch} has random weights: use full/default"):
        run(scratch, "lora/r8_attention", tmp_path / "third")


# ---- learning ----


@pytest.fixture(scope="module")
def finished(images_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT with LoRA that tells dark from light, trained from a folder of images."""
    root = tmp_path_factory.mktemp("finished")
    folder_of_images(root / "pictures", {"train": 12, "validation": 4, "test": 4})
    (root / "task.yaml").write_text(
        "family: image_classification\ndata: {path: imagefolder, data_dir: pictures}\ncalibrate: true\n"
        "class_weights: balanced\nloss: focal\noversample: true\n"
    )
    ptft_hf.train(
        model=str(images_of("vit")),
        task=root / "task.yaml",
        adapter="lora/r8_attention",
        output_dir=root / "run",
        settings={"num_train_epochs": 3, "per_device_train_batch_size": 8, "learning_rate": 0.01, "warmup_steps": 0},
    )
    return root / "run"


def test_it_learns_with_the_means_against_imbalance_and_is_calibrated(finished: Path) -> None:
    model = ptft_hf.load(finished)
    assert model.run["metrics"]["test"]["accuracy"] == 1.0
    assert model.evaluate(split="test")["accuracy"] == 1.0
    assert any(note.startswith("temperature ") for note in model.run["notes"])
    assert curve(finished)[-1] < curve(finished)[0]


def test_evaluate_takes_a_folder(finished: Path, tmp_path: Path) -> None:
    folder_of_images(tmp_path / "new", {"test": 3})
    result = ptft_hf.load(finished).evaluate(tmp_path / "new")
    assert result["accuracy"] == 1.0
    assert [row["support"] for row in result["report"]["per_class"]] == [3, 3]


def test_predict_takes_paths_images_and_arrays(finished: Path, tmp_path: Path) -> None:
    model = ptft_hf.load(finished)
    array = np.full((9, 7, 3), 30, dtype=np.uint8)
    path = tmp_path / "a.png"
    Image.fromarray(array).save(path)
    given = [path, str(path), {"image": str(path)}, Image.fromarray(array), array, {"image": array}]
    given += [torch.tensor(array), array.tolist()]
    (first, *others) = model.predict(given)
    assert first["label"] == DARK
    assert others == [first] * 7
    assert model.predict([]) == []
    for wrong, message in (
        (tmp_path / "b.png", r"input 2: .*b\.png: no such file"),
        ({"text": "a"}, r"input 2: 'image' must be given; the input has \['text'\]"),
        (5, "input 2: int is neither the path of an image"),
        (np.zeros(3), "input 2: an array of shape"),
    ):
        with pytest.raises(DataError, match=message):
            model.predict([path, wrong])
    (tmp_path / "c.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"row 1: .*c\.png: not an image"):
        model.predict([tmp_path / "c.png"])


def test_the_command_takes_paths_and_json_lines(ptft: Ptft, finished: Path, tmp_path: Path) -> None:  # noqa: F811
    names = [str(tmp_path / f"{shade}.png") for shade in (10, 240)]
    for name, shade in zip(names, (10, 240), strict=True):
        Image.new("L", (8, 8), shade).save(name)
    found = answers(ptft("predict", finished, *names))
    assert [answer["label"] for answer in found] == [DARK, LIGHT]
    lines = tmp_path / "in.jsonl"
    lines.write_text(json.dumps({"image": names[1]}) + "\n" + json.dumps(names[0]) + "\n")
    assert answers(ptft("predict", finished, "--input", lines)) == found[::-1]
    done = ptft("predict", finished, tmp_path / "none.png")
    assert done.code == 2
    assert "none.png: no such file" in done.err


def test_a_merged_model_gives_the_same_answers(finished: Path, tmp_path: Path) -> None:
    merged, comparison = inference.merge(finished, tmp_path / "merged")
    assert comparison["examples"] == 8
    assert comparison["label_changes"] == 0
    shown = pictures(4, 7)["image"][:]
    assert all(map(merged.task.same, merged.predict(shown), ptft_hf.load(finished).predict(shown)))


@pytest.mark.slow
def test_a_merged_model_whose_data_is_gone_is_compared_on_samples(
    images_of: Callable[[str], Path], tmp_path: Path
) -> None:
    run(images_of("vit"), "lora/r8_attention", tmp_path / "run")
    assert inference.merge(tmp_path / "run", tmp_path / "merged")[1]["examples"] == 2


@pytest.mark.parametrize("channels", [pytest.param(3, marks=pytest.mark.slow), 1])
def test_the_cards_lines_for_upstreams_libraries_give_the_same_logits(channels: int, tmp_path: Path) -> None:
    base = make_image_checkpoint("vit", tmp_path / "vit", num_channels=channels)
    run(base, "lora/r16_all_linear" if channels == 3 else "full/default", tmp_path / "run")
    _, tokens = card_of(tmp_path / "run")
    upstream, own = code_of(tokens)
    assert "ptft_hf" not in upstream
    picture = pictures(1, 4)["image"][0]
    picture.save(tmp_path / "photo.png")
    model = ptft_hf.load(tmp_path / "run")
    (encoded,) = model.task.encode(datasets.Dataset.from_dict({"image": [picture]}), model.tokenizer, 1)[0].to_list()
    with torch.no_grad():
        expected = model.model(**model.task.collator(model.tokenizer)([encoded])).logits
    own = own.replace("print(model.predict(", "answers = (model.predict(")
    logits, found = result_of(f"{upstream}\n{own}", "(logits, answers)", tmp_path)
    assert torch.equal(logits, expected)
    assert found == model.predict([picture])


# ---- batches ----


def test_a_batch_holds_the_processors_pixels_and_the_labels(images_of: Callable[[str], Path]) -> None:
    task = tasks.build(recipe())
    table = pictures(4, 3)
    whole = datasets.DatasetDict(train=table, validation=table, test=table)
    task.look_at(tasks.load_splits(task, whole, task.recipe, 1))
    processor = transformers.AutoImageProcessor.from_pretrained(images_of("vit"))
    rows, cut = task.encode(table, processor, 1)
    assert (cut, rows["length"][:]) == (0, [32 * 32] * 4)
    batch = task.collator(processor)(rows.to_list())
    expected = processor(table["image"][:], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"], expected)
    assert batch["labels"].tolist() == [0, 1, 0, 1]


def test_a_processor_of_one_channel_reads_grey() -> None:
    config = transformers.ViTConfig(image_size=8, num_channels=1)
    processor = default_processor(config)
    task = tasks.build(recipe())
    table = datasets.Dataset.from_dict({"image": [Image.new("RGB", (4, 4), (255, 255, 255))]})
    rows, _ = task.encode(table, processor, 1)
    pixels = task.collator(processor)(rows.to_list())["pixel_values"]
    assert pixels.shape == (1, 1, 8, 8)
    assert torch.equal(pixels, torch.ones_like(pixels))


def test_a_made_up_processor_fits_the_configuration() -> None:
    for config, size in (
        (transformers.ResNetConfig(), (224, 224)),
        (transformers.ViTConfig(image_size=[4, 6]), (4, 6)),
    ):
        pixels = default_processor(config)([Image.new("RGB", (9, 9))], return_tensors="pt")["pixel_values"]
        assert pixels.shape == (1, 3, *size)
        assert torch.equal(pixels, -torch.ones_like(pixels))


@pytest.mark.parametrize(
    ("sizes", "read"), [([(40, 36)] * 3, (36, 40)), ([(8, 8)] * 2, (32, 32)), ([(8, 8), (9, 9)], (224, 224))]
)
def test_from_nothing_images_keep_a_size_that_they_share(
    sizes: list[tuple[int, int]], read: tuple[int, int]
) -> None:
    """Pillow says width first. A configuration's own size comes before."""
    task: Any = tasks.build(recipe())
    table = datasets.Dataset.from_dict({"image": [Image.new("L", size) for size in sizes]})
    reader, notes = task.reader_from_nothing("config:resnet", transformers.ResNetConfig(num_channels=1), table)
    assert (reader.size["height"], reader.size["width"]) == read
    assert bool(notes) == (read != (224, 224))
    reader, notes = task.reader_from_nothing("config:vit", transformers.ViTConfig(image_size=16), table)
    assert (reader.size["height"], reader.size["width"]) == (16, 16) and not notes


@pytest.mark.slow
def test_multi_label_and_regression_are_had_as_for_texts(
    images_of: Callable[[str], Path], tmp_path: Path
) -> None:
    for labels, kind, found in (
        ([[DARK], [LIGHT], [DARK, LIGHT], [LIGHT]] * 2, datasets.List(datasets.Value("string")), "micro_f1"),
        ([0.0, 1.5, 0.25, 2.0] * 2, datasets.Value("float64"), "pearson"),
    ):
        table = pictures(8, 2).remove_columns("label").add_column("label", labels, feature=kind)
        data = datasets.DatasetDict(train=table, validation=table, test=table)
        trained = run(images_of("resnet"), "full/default", tmp_path / found, data, max_steps=1)
        assert found in trained.run["metrics"]["test"]


# ---- running means ----


def test_a_frozen_networks_running_means_stay_the_bases(
    images_of: Callable[[str], Path], tmp_path: Path
) -> None:
    """An adapter does not save them; upstream's train() changes them, the frozen layers' too."""
    base = images_of("resnet")
    plain = transformers.AutoModelForImageClassification.from_pretrained(base, num_labels=2)
    before = {name: value.clone() for name, value in plain.named_buffers()}
    wrapped = peft.get_peft_model(plain, peft.LoraConfig(target_modules=r".*\.convolution"))
    wrapped.train()(pixel_values=torch.randn(4, 3, 32, 32))
    assert any(not torch.equal(v, before[n]) for n, v in plain.named_buffers() if n in before)
    trained = run(base, "lora/r16_all_linear", tmp_path / "run", **{"adapter.trunk_dropout": True})
    found = dict(trained.model.get_base_model().named_buffers())
    assert before
    assert all(torch.equal(found[name], value) for name, value in before.items())


# ---- refusals ----


@pytest.mark.parametrize(
    ("architecture", "method", "message"),
    [
        ("resnet", "lora/r8_attention", "no linear query and value projections to adapt; it has convolutions alone"),
        ("resnet", "bottleneck/pfeiffer", "ResNetForImageClassification have no one hidden size"),
        ("vit", "prompt/tokens20", "stands before the tokens of a text, and ViTForImageClassification reads pixel"),
        ("vit", "prefix/tokens20", "stands before the tokens of a text"),
    ],
)
def test_methods_that_do_not_fit_are_refused_by_name(
    architecture: str, method: str, message: str, images_of: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match=message):
        run(images_of(architecture), method, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_data_and_models_that_do_not_fit_are_refused(images_of: Callable[[str], Path], tmp_path: Path) -> None:
    texts = datasets.Dataset.from_list([{"image": "a.png", "label": "x"}, {"image": "b.png", "label": "y"}])
    data = datasets.DatasetDict(train=texts, validation=texts, test=texts)
    with pytest.raises(DataError, match="image: the column holds string, not images; use path: imagefolder"):
        run(images_of("vit"), "full/default", tmp_path / "run", data)
    bare = tmp_path / "bare"
    transformers.AutoModel.from_pretrained(images_of("vit")).save_pretrained(bare)
    with pytest.raises(ModelError, match="bare: "):
        run(bare, "full/default", tmp_path / "run")
    broken = splits().cast_column("image", datasets.Image(decode=False))
    row = {"image": {"bytes": b"no image", "path": None}, "label": DARK}
    broken["train"] = datasets.concatenate_datasets(
        [broken["train"], datasets.Dataset.from_list([row]).cast(broken["train"].features)]
    )
    with pytest.raises(DataError, match="row 17: an image of the table: not an image that Pillow can read"):
        run(images_of("vit"), "full/default", tmp_path / "run", broken)
    assert not (tmp_path / "run").exists()


def test_recipes_of_images_know_their_names() -> None:
    for name in ("digits", "fashion_mnist"):
        assert recipes.load_task(f"image_classification/{name}").family == "image_classification"
    wrong = {"columns": {"text": "a"}, "model": {"max_length": 5}}
    with pytest.raises(RecipeError) as caught:
        recipes.load_task("image_classification/digits", wrong)
    assert "unknown column 'text'; known: image, label" in str(caught.value)
    assert "max_length: an image has no tokens; leave it out" in str(caught.value)


def test_inspect_shows_class_and_size(ptft: Ptft, images_of: Callable[[str], Path], tmp_path: Path) -> None:  # noqa: F811
    folder_of_images(tmp_path / "pictures", {"train": 4, "validation": 2, "test": 2})
    task = tmp_path / "task.yaml"
    task.write_text("family: image_classification\ndata: {path: imagefolder, data_dir: pictures}\n")
    done = ptft("inspect", "--model", images_of("vit"), "--task", task, "--rows", 1)
    assert done.code == 0, done.err
    assert "  1  [[dark]] <- image of 6 x 6 pixels (RGB), read as 3 x 32 x 32\n" in done.out
    assert "train, 8 rows, 8 inputs of up to 1,024 pixels" in done.out
