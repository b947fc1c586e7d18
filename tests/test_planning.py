"""Forecasts: what is counted against sums by hand and against real tensors, and that they never harm a run."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DefaultFlowCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

import ptft_hf
from ptft_hf import checkpoints, frozen, planning, preparing, recipes
from ptft_hf.errors import ModelError, RecipeError
from ptft_hf.frozen.layers import FrozenLayers
from ptft_hf.planning import batches, forecasts, machine, memory, probing, sums, timing
from ptft_hf.planning.batches import Batch, Schedule
from ptft_hf.planning.counting import ACTIVATIONS, GRADIENTS, LARGE, LOGITS, WEIGHTS, Counted, Counter
from tests import tiny_images
from tests.commands import Ptft, ptft  # noqa: F401
from tests.conformance.matrix import METHODS, Cell, checkpoint, data, recipe
from tests.conformance.running import SETTINGS
from tests.runs import NO_DROPOUT, short_run, splits, weights
from tests.runs import recipe as classification
from tests.tiny import make_checkpoint

# ruff: noqa: F811 - fixtures are imported, and then named as parameters

# ---- counted, and by hand ----


def test_a_perceptron_holds_what_a_hand_finds():
    batch, wide, hidden, classes = 6, 5, 7, 3
    counter = Counter()
    with counter:
        model = nn.Sequential(nn.Linear(wide, hidden), nn.ReLU(), nn.Linear(hidden, classes))
        assert counter.live == 4 * (wide * hidden + hidden + hidden * classes + classes)
        weights, labels = counter.live, torch.zeros(batch, dtype=torch.long)
        inputs = torch.empty(batch, wide)
        with counter.counting() as counted:
            first = model[0](inputs)
            second = model[1](first)
            loss = torch.nn.functional.cross_entropy(model[2](second), labels)
            held = counter.live - weights - 4 * batch * wide
            del first
            # ReLU's result serves its own backward pass; of its input nobody asks again. log_softmax's is kept.
            assert counter.live - weights - 4 * batch * wide == 4 * (batch * (hidden + classes) + 2) + 8 * batch
            assert held - 4 * batch * hidden == 4 * (batch * (hidden + classes) + 2) + 8 * batch
            loss.backward()
        del loss, second
    products = 2 * batch * (wide * hidden + hidden * classes)
    # Forwards; backwards by weights, and by what the second layer reads.
    assert counted().flops == 2 * products + 2 * batch * hidden * classes
    assert counter.live == 2 * weights + 4 * batch * wide + 8 * batch


def one_layer(tmp_path: Path) -> tuple[Path, dict[str, int]]:
    sizes = {"h": 32, "f": 48, "v": 0, "p": 72, "heads": 2}
    folder = make_checkpoint(
        "bert",
        tmp_path / "bert",
        sizes=dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48),
        **NO_DROPOUT,
    )
    sizes["v"] = json.loads((folder / "config.json").read_text("utf-8"))["vocab_size"]
    return folder, sizes


def counted_run(model: Path | str, adapter: Any = "full/default", **settings: Any) -> sums.Sums:
    asked = preparing.make_plan(str(model), classification(), adapter, {**SETTINGS, "max_steps": 3, **settings})
    return planning.count(asked, copy.copy(data("sequence_classification")), 1)[2]


def test_holes_are_what_was_freed_below_what_is_held():
    counter, number = Counter(), 4
    with counter:
        x = torch.empty(10)
        with counter.counting() as counted:
            x.new_empty(3)  # gone before anything else is there: no hole
            below, held = x.new_empty(5), x.new_empty(20)
            del below  # a hole
            below, passing = x.new_empty(7), x.new_empty(9)
            del below, passing  # nothing above them stays
            top = x.new_empty(40)
            below = x.new_empty(2)  # freed after the peak
            assert counted() == counted()
            found = counted()
            del below, held, top
        assert (found.peak, found.holes) == (number * (10 + 20 + 40 + 2), number * 5)
        assert found.freed == number * (3 + 5 + 7 + 9)
        assert (found.scaled(2.0).holes, found.scaled(2.0).freed) == (2 * found.holes, 2 * found.freed)
        with counter.counting() as counted:
            below, held = x.new_empty(LARGE // number), x.new_empty(5)
            del below  # goes back to the system
            top = x.new_empty(LARGE // number + 5)
            assert counted().holes == 0
        del held, top
        with counter.counting() as counted:
            pins = []
            for _ in range(3):  # three holes, of more than is held
                below = x.new_empty(50)
                pins.append(x.new_empty(1))
                del below
            top = x.new_empty(90)
            assert (counted().holes, counted().freed) == (number * (3 + 90), number * 150)
        del pins, top


def test_the_terms_of_a_one_layer_model_are_those_of_a_hand(tmp_path: Path):
    folder, s = one_layer(tmp_path)
    found = counted_run(folder)
    h, f = s["h"], s["f"]
    embeddings = (s["v"] + s["p"] + 2) * h + 2 * h
    layer = 4 * (h * h + h) + 2 * h + (h * f + f) + (f * h + h) + 2 * h
    parameters = embeddings + layer + (h * h + h) + (2 * h + 2)
    buffers = 2 * 8 * s["p"]  # positions and types, integers of eight bytes
    assert found.parameters == 4 * parameters
    assert 4 * parameters <= found.weights <= 4 * parameters + buffers
    assert found.gradients == found.saved == 4 * parameters
    tensors = 5 + 16 + 2 + 2
    assert found.optimizer == 2 * 4 * parameters + 4 * tensors  # two moments, and the number of steps
    assert found.stepping.peak == found.weights + 4 * parameters + found.optimizer


def test_a_layers_activations_are_those_of_a_hand_and_of_autograd(tmp_path: Path):
    """What is saved for the backward pass, by the operations of a BERT layer: 4 bytes each of B x T x ..."""
    import transformers

    folder, s = one_layer(tmp_path)
    B, T, h, f, n = 3, 8, s["h"], s["f"], s["heads"]
    config = transformers.AutoConfig.from_pretrained(folder, attn_implementation="eager", **NO_DROPOUT)
    ids = torch.ones(B, T, dtype=torch.long)

    def held() -> int:
        """Of a real model, by autograd's own hooks: storages that are saved and are no weights."""
        model = transformers.AutoModel.from_config(config, add_pooling_layer=False).train()
        own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
        saved: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own and tensor.is_floating_point():
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            result = model(input_ids=ids)["last_hidden_state"]
        saved.pop(result.untyped_storage().data_ptr(), None)
        return sum(saved.values())

    counter = Counter()
    with counter:
        model = transformers.AutoModel.from_config(config, add_pooling_layer=False).train()
        before = counter.live
        with counter.counting():
            result = model(input_ids=ids)["last_hidden_state"]
            counted = counter.live - before - 4 * B * T * h
        del result
    norms = 3 * (B * T * h + 2 * B * T)  # the input of each of three layer norms, its means and deviations
    linear = 3 * B * T * h + B * T * f  # what qkv, the output, and the feed-forward's two read
    attention = 3 * B * T * h + B * n * T * T  # queries, keys, values and the softmax
    gelu = B * T * f
    assert counted == pytest.approx(4 * (norms + linear + attention + gelu), rel=0.1)
    assert counted == pytest.approx(held(), rel=0.05)


# ---- from sums to a forecast ----


def some_sums(**changes: Any) -> sums.Sums:
    def counted(**kinds: int) -> Counted:
        return Counted(sum(kinds.values()), kinds, 0, 600, 700, 1e9, 1e6, 100, frozenset())

    fields: dict[str, Any] = {
        "weights": 1000,
        "gradients": 800,
        "optimizer": 1600,
        "first": counted(weights=1000, activations=5000, logits=200, gradients=50),
        "later": counted(weights=1000, activations=4000),
        "short": None,
        "stepping": counted(weights=1000, gradients=800, optimizer=1600),
        "evaluation": counted(weights=1000, activations=300),
        "written": 0,
        "cache": 70,
        "frozen_layers": 0,
        "saved": 800,
        "parameters": 1000,
        "compared": 0,
        "reads_best": False,
        "half": False,
        "products": 3,
        "schedule": Schedule(4, 1, [Batch((0, 1), 10), Batch((2, 3), 8)] * 2, 2.0, 4),
    }
    return sums.Sums(**{**fields, **changes})


PLAIN = memory.Calibration(0.0, 0.0, 0.0)
CONSTANTS = memory.Calibration(libraries=30, holes=0.5, kernels=7)


def test_the_largest_step_is_the_first_or_a_later_one_with_the_optimizers_state():
    assert memory.largest(some_sums())[0] == {WEIGHTS: 1000, "optimizer": 1600, ACTIVATIONS: 4000}
    adapter = some_sums(optimizer=20)
    assert memory.largest(adapter)[0] == {WEIGHTS: 1000, ACTIVATIONS: 5000, LOGITS: 200, GRADIENTS: 50}
    light = some_sums(first=some_sums().evaluation, later=some_sums().evaluation)
    assert memory.largest(light)[0] == {WEIGHTS: 1000, GRADIENTS: 800, "optimizer": 1600}


def test_accumulated_gradients_are_there_beside_the_activations():
    plan = some_sums().schedule
    accumulating = some_sums(schedule=plan._replace(micro=2))
    assert memory.largest(accumulating)[0][GRADIENTS] == 800
    assert sum(memory.largest(accumulating)[0].values()) == 1000 + 800 + 1600 + 4000


def test_constants_add_what_no_count_sees():
    found = memory.stages(some_sums(), 100, CONSTANTS)
    terms = found["training"]
    assert (terms[memory.BASELINE], terms[memory.CACHE]) == (100, 70)
    assert terms[memory.KERNELS] == 21
    assert terms[memory.LIBRARIES] == 30
    assert terms[memory.ALLOCATOR] == 0.5 * 600
    later = some_sums(later=some_sums().first._replace(holes=900))
    assert memory.stages(later, 100, CONSTANTS)["training"][memory.ALLOCATOR] == 0.5 * 900
    assert memory.peak(found) == sum(terms.values())
    assert memory.peak(found, proof=True) == memory.peak(found)


def test_in_the_proof_the_model_is_there_twice_and_no_optimizer():
    terms = memory.stages(some_sums(compared=50_000), 100, CONSTANTS)
    assert sum(terms["proof"].values()) == 100 + 1000 + 1000 + 30 + 21 + 50_000
    assert memory.peak(terms, proof=True) == sum(terms["proof"].values()) > memory.peak(terms)


def test_small_pieces_stay_when_files_are_mapped_and_large_ones_do_not():
    first = some_sums().first
    given = {"optimizer": 20, "later": None, "reads_best": True, "cache": 0}
    small, large = some_sums(**given), some_sums(**given, first=first._replace(large=3000))
    stages = [memory.stages(one, 100, PLAIN) for one in (small, large)]
    assert [sum(found["training"].values()) for found in stages] == [6350, 6350]
    assert [sum(found["best checkpoint"].values()) for found in stages] == [6350 + 800, 6350 - 3000 + 800]


def test_a_quantized_bases_files_are_read_anew_for_the_proof():
    found = memory.stages(some_sums(), 100, PLAIN, reads=50_000)
    assert found["loading"][memory.READ] == found["proof"][memory.READ] == 50_000
    assert memory.peak(found, proof=True) == 100 + 1000 + 1000 + 50_000


def test_texts_that_are_written_count_in_the_evaluation():
    quiet, writing = (memory.stages(some_sums(written=n), 0, PLAIN)["evaluation"] for n in (0, 10_000))
    assert sum(writing.values()) == 1000 + 1600 + 70 + 10_000
    assert sum(quiet.values()) == 1000 + 1600 + 70 + 300


def test_keys_and_values_of_a_position():
    import transformers

    llama = transformers.AutoConfig.for_model(
        "llama", hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
    )
    assert sums.key_value_size(llama, 2) == 2 * 3 * 2 * 16 * 2
    t5 = transformers.AutoConfig.for_model("t5", d_model=64, num_layers=2, num_decoder_layers=5, num_heads=4, d_kv=8)
    assert sums.key_value_size(t5, 4) == 2 * 5 * 4 * 8 * 4


def test_disk_is_the_model_the_kept_checkpoints_and_the_one_in_the_making():
    args = SimpleNamespace(save_strategy="steps", save_steps=1, save_total_limit=1, load_best_model_at_end=True)
    files = forecasts.TOKENIZER_FILES
    assert forecasts.disk(some_sums(), args) == {
        "model": 800 + files,
        "checkpoints": 2 * (800 + 1600 + files),
        "being written": 800 + 1600 + files,
    }
    args.save_strategy = "no"
    assert forecasts.disk(some_sums(), args) == {"model": 800 + files}


def test_seconds_through_two_measured_batches():
    small, large = Batch((0,), 10), Batch((0,), 30)
    line = timing.through((small, 2.0), (large, 4.0))
    assert line.of(10) == pytest.approx(2.0)
    assert line.of(30 + 10, 2) == pytest.approx(6.0)
    assert timing.through((large, 1.0), (small, 3.0)).each == pytest.approx(1 / 30)  # noise: the first alone
    assert timing.through((Batch((0,), 11), 3.0), (small, 1.2)).each == pytest.approx(0.2)  # of like size: both


def test_a_probe_takes_the_place_of_what_was_counted():
    args = SimpleNamespace(save_strategy="no")
    before = forecasts.forecast(some_sums(products=4), args, 100, calibration=PLAIN._replace(kernels=100.0))
    seconds = {"longest": 2.0, "typical": 2.0, "first": 0.5, "shape": 0.25, "filling": 0.0}
    measured = {"peak_memory_mb": 1.0, "shapes": 1, "filled_tokens": 0}
    measured |= {f"{name}_seconds": value for name, value in seconds.items()}
    after = forecasts.with_probe(before, some_sums(products=4, half=True), measured)
    assert after.probed and after.counted == before.peak
    assert after.peak == 1_000_000 + 70 + 200  # one of two shapes has been seen
    assert after.seconds == pytest.approx(2.0 * (20 + 16 + 20 + 16) / 20 + 0.5 + 0.25)
    after = forecasts.with_probe(before, some_sums(products=4), measured)
    assert after.seconds == pytest.approx(2.0 * (20 + 16 + 20 + 16) / 20 + 0.5)  # no code for a shape in float32


def test_a_step_lasts_from_the_end_of_the_one_before(monkeypatch: pytest.MonkeyPatch):
    """With the reading of its batch; the first alone from its own beginning."""
    clock, now = probing.StepClock(), SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(probing.time, "perf_counter", lambda: now.seconds)
    handler = CallbackHandler([clock, DefaultFlowCallback()], None, None, None, None)
    args, state = TrainingArguments(report_to="none", use_cpu=True), TrainerState(max_steps=100)
    control, stops = TrainerControl(), []
    for begins, ends in ((107.0, 110.0), (111.0, 115.0), (115.0, 115.5), (120.0, 121.5), (121.5, 122.0)):
        for at, event in ((begins, handler.on_step_begin), (ends, handler.on_step_end)):
            now.seconds = at
            event(args, state, control)
        stops.append(control.should_training_stop)
    assert clock.seconds == [3.0, 5.0, 0.5, 6.0, 0.5]
    assert stops == [False] * 4 + [True]  # two steps are timed, however long the first


# ---- batches ----


def test_the_batches_are_those_of_the_runs_own_sampler(tmp_path: Path, checkpoint: Callable[[str], Path]):
    from tests.runs import build

    rows = [{"text": "the film " * (1 + i % 9), "label": ("neg", "pos")[i % 2]} for i in range(40)]
    trainer, _ = build(checkpoint("bert"), splits(rows), tmp_path / "run", num_train_epochs=2)
    found = batches.schedule(trainer)
    seen: list[tuple[int, int]] = []
    for epoch in range(2):
        loader = trainer.get_train_dataloader()
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        seen += [tuple(batch["input_ids"].shape) for batch in loader]
    assert [(len(batch.rows), batch.width) for batch in found.batches] == seen
    assert (found.steps, found.epochs) == (10, 2.0)
    assert found.first.width == max(width for _, width in seen)


@pytest.mark.parametrize(("accumulated", "epochs", "micro"), [(4, 2, 4), (4, 1.5, 4), (100, 2, 6)])
def test_an_epochs_last_step_has_the_batches_that_are_left(
    tmp_path: Path, checkpoint: Callable[[str], Path], accumulated: int, epochs: float, micro: int
):
    from tests.runs import build

    rows = [{"text": "the film " * (1 + i % 9), "label": ("neg", "pos")[i % 2]} for i in range(48)]
    given = {"num_train_epochs": epochs, "gradient_accumulation_steps": accumulated, "save_strategy": "no"}
    trainer, _ = build(checkpoint("bert"), splits(rows), tmp_path / "run", eval_strategy="no", **given)
    found = batches.schedule(trainer)
    seen: list[tuple[int, int]] = []
    step = trainer.training_step

    def counted(model: Any, inputs: Any, *others: Any) -> Any:
        seen.append(tuple(inputs["input_ids"].shape))
        return step(model, inputs, *others)

    trainer.training_step = counted
    trainer.train()
    assert [(len(batch.rows), batch.width) for batch in found.batches] == seen
    assert (found.steps, found.passes, found.micro) == (trainer.state.global_step, len(seen), micro)


# ---- every family, and no harm ----

CELLS = [
    Cell("bert", "sequence_classification", "full/default"),
    Cell("roberta", "token_classification", "lora/r16_all_linear"),
    Cell("distilbert", "sequence_classification", "prefix/tokens20"),
    Cell("bert", "token_classification", "bottleneck/houlsby"),
    Cell("modernbert", "masked_lm", "full/default"),
    Cell("bert", "masked_lm", "partial/top_2_layers"),
    Cell("gpt2", "causal_lm", "lora/r8_attention"),
    Cell("llama", "causal_lm", "full/default"),
    Cell("t5", "summarization", "lora/r16_all_linear"),
    Cell("bart", "summarization", "full/default"),
    Cell("qwen2", "summarization", "prefix/tokens20"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("planning")


def test_the_code_of_earlier_runs_is_not_counted_again(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "_with_code", 1000)
    assert [machine.new_kernels(count) for count in (20, 20, 20)] == [20, 4, 0]
    cell = CELLS[0]
    settings = {**SETTINGS, "max_steps": 3, "bf16": True}
    asked = preparing.make_plan(str(checkpoint(cell, root)), recipe(cell.family), cell.method, settings)
    ready = preparing.prepare(asked, copy.copy(data(cell.family)), 1)
    arguments = preparing.training_arguments(asked, ready, root / "run", 1)
    counts = []
    for code in (0, machine.KEPT_KERNELS):
        monkeypatch.setattr(machine, "_with_code", code)
        found = planning.before_run(asked, ready, arguments)
        assert found is not None
        counts.append(found.stages["training"].get(memory.KERNELS, 0))
    assert counts[0] > 0 and counts[1] == 0
    assert found.stages["training"][memory.LIBRARIES] == memory.HALF.libraries
    asked = asked._replace(given={**asked.given, "bf16": False})
    single = planning.before_run(asked, ready, preparing.training_arguments(asked, ready, root / "run", 1))
    assert single is not None and single.stages["training"][memory.LIBRARIES] == memory.FLOAT.libraries


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: cell.name)
def test_every_family_is_forecast_alike_before_weights_are_loaded_and_after(cell: Cell, root: Path):
    settings = {**SETTINGS, "max_steps": 3, "eval_strategy": "steps", **METHODS[cell.method]}
    asked = preparing.make_plan(str(checkpoint(cell, root)), recipe(cell.family), cell.method, settings)
    ready = preparing.prepare(asked, copy.copy(data(cell.family)), 1)
    arguments = preparing.training_arguments(asked, ready, root / "run", 1)
    before, state = weights(ready.model), torch.get_rng_state()
    found = planning.before_run(asked, ready, arguments)
    assert found is not None
    assert torch.equal(state, torch.get_rng_state()), "a random number was drawn"
    assert all(torch.equal(value, before[name]) for name, value in weights(ready.model).items())
    assert not ready.model._forward_hooks
    assert not any(p.grad is not None for p in ready.model.parameters())
    held = {t.untyped_storage().data_ptr(): t for t in [*ready.model.parameters(), *ready.model.buffers()]}
    real = sum(t.untyped_storage().nbytes() for t in held.values() if t.is_floating_point())
    assert found.stages["training"][WEIGHTS] == pytest.approx(real, rel=0.03, abs=4000)
    counted = planning.count(asked, copy.copy(data(cell.family)), 1)[2]
    terms, _ = memory.largest(counted)
    assert {name: found.stages["training"][name] for name in terms} == pytest.approx(terms, rel=0.02)


def test_images_are_forecast(tmp_path: Path):
    model = tiny_images.make_image_checkpoint("vit", tmp_path / "vit")
    task = recipes.task_from_dict({"name": "t", "family": "image_classification"})
    settings = {name: value for name, value in SETTINGS.items() if name != "model.max_length"}
    given = {"data": tiny_images.splits(16), "settings": settings}
    found = ptft_hf.plan(model=str(model), task=task, adapter="lora/r8_attention", **given)
    assert found.stages["training"][ACTIVATIONS] > 0
    assert found.fits


def test_a_model_from_nothing_is_forecast():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    settings = {"max_steps": 3, **{f"model.{name}": value for name, value in sizes.items()}}
    given = {"task": recipe("causal_lm"), "data": copy.copy(data("causal_lm")), "settings": settings}
    found = ptft_hf.plan(model="config:llama", adapter="full/default", **given)
    per_layer = 4 * 32 * 32 + 3 * 32 * 48
    assert found.stages["training"][WEIGHTS] > 4 * 2 * per_layer
    assert found.stages["training"][LOGITS] > 0


def test_a_frozen_trunk_is_kept_and_counted(root: Path):
    settings = {"max_steps": -1, "num_train_epochs": 3}
    model = checkpoint(CELLS[0], root)
    found = counted_run(model, "partial/head_only", **settings)
    assert found.frozen_layers == 3
    tokens = found.cache / (32 * 4)
    assert tokens == int(tokens) > 16 * 4
    assert counted_run(model, "partial/head_only", **{**settings, "adapter.frozen_cache_gb": 0}).cache == 0


def test_checkpointing_and_four_bits_hold_less(tmp_path: Path):
    pytest.importorskip("bitsandbytes")
    sizes = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=2, intermediate_size=256)
    model = make_checkpoint("bert", tmp_path / "bert", sizes=sizes, **NO_DROPOUT)
    plain = counted_run(model, "lora/r16_all_linear")
    again = counted_run(model, "lora/r16_all_linear", **{planning.CHECKPOINTING: True})
    assert again.first.kinds[ACTIVATIONS] < 0.7 * plain.first.kinds[ACTIVATIONS]
    assert again.first.flops > 1.2 * plain.first.flops
    assert again.first.holes == round(sums.SCATTERED * again.first.freed)
    quantized = counted_run(model, "lora/qlora_nf4")
    linear = 4 * (4 * 64 * 64 + 2 * 64 * 256)
    assert plain.weights - quantized.weights == pytest.approx(4 * linear - linear / 2, rel=0.05)


def test_logits_of_a_language_model_are_told(root: Path):
    cell = Cell("llama", "causal_lm", "full/default")
    asked = preparing.make_plan(str(checkpoint(cell, root)), recipe("causal_lm"), cell.method, SETTINGS)
    found = planning.count(asked, copy.copy(data("causal_lm")), 1)[2]
    rows, width, _ = found.schedule.first.shape
    vocabulary = len(json.loads((checkpoint(cell, root) / "tokenizer.json").read_text("utf-8"))["model"]["vocab"])
    assert found.first.kinds[LOGITS] % (4 * vocabulary) == 0
    assert found.first.kinds[LOGITS] >= 4 * rows * width * vocabulary


# ---- in a run ----


def test_there_is_no_optimizers_state_when_the_model_is_loaded_back(
    tmp_path: Path, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
):
    stepped: list[Any] = []
    usual, prove = torch.optim.AdamW.step, checkpoints.prove

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        stepped.append(self)
        return usual(self, *args, **kwargs)

    def proven(*args: Any) -> Any:
        assert stepped, "the optimizer is another"
        left.append(len(stepped[-1].state))
        return prove(*args)

    left: list[int] = []
    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    monkeypatch.setattr(checkpoints, "prove", proven)
    short_run(checkpoint("bert"), "full/default", tmp_path / "run")
    assert left == [0]


def test_a_run_tells_forecast_and_measured(tmp_path: Path, checkpoint: Callable[[str], Path], capsys: Any):
    trained = short_run(checkpoint("bert"), "lora/r8_attention", tmp_path / "run")
    run = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    assert trained.run["forecast"] == run["forecast"]
    assert run["forecast"]["peak_memory_mb"] == pytest.approx(run["training"]["peak_memory_mb"], rel=0.3)
    assert run["training"]["peak_memory_mb_with_proof"] >= run["training"]["peak_memory_mb"]
    captured = capsys.readouterr()
    assert "forecast  peak memory " in captured.err
    assert "\nforecast: peak memory " in captured.out


def test_a_forecast_that_fails_stops_no_run(
    tmp_path: Path, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    def fails(*_: Any) -> None:
        raise ZeroDivisionError("nothing to divide by")

    monkeypatch.setattr(planning, "count_run", fails)
    short_run(checkpoint("bert"), "full/default", tmp_path / "run")
    run = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    assert run["forecast"] is None
    assert "no forecast of memory and time: ZeroDivisionError: nothing to divide by" in capsys.readouterr().err


def test_a_run_that_will_not_fit_says_so_first(
    tmp_path: Path, checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    monkeypatch.setattr(machine, "available", lambda: 10_000_000)
    short_run(checkpoint("bert"), "full/default", tmp_path / "run")
    said = capsys.readouterr().err
    assert said.index("will probably NOT FIT") < said.index("Training: ")


def test_what_does_not_fit_gets_advice_that_counts(tmp_path: Path, checkpoint: Callable[[str], Path]):
    given = {"task": classification(), "data": data("sequence_classification"), "settings": SETTINGS}
    found = ptft_hf.plan(model=str(checkpoint("bert")), adapter="full/default", memory="1MB", **given)
    assert not found.fits
    changes = {one.change: one.peak for one in found.advice}
    assert any("per_device_train_batch_size=1 --set gradient_accumulation_steps=8" in change for change in changes)
    assert any("checkpointing" in change for change in changes)
    assert "--adapter lora/r16_all_linear" in changes
    assert changes["all of these together"] < found.peak_in_all


# ---- the machine ----


@pytest.mark.parametrize(
    ("text", "size"), [("16GiB", 16 * 2**30), ("500 MB", 500_000_000), ("1.5g", 1_500_000_000), ("1000", 1000)]
)
def test_sizes(text: str, size: int):
    assert machine.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "much", "-1GB", "0", "1 parsec"])
def test_what_is_no_size_is_named(text: str):
    with pytest.raises(RecipeError, match="is no size; write it as 16GiB"):
        machine.parse_size(text)


def test_the_limit_of_a_control_group_is_less_than_the_machine(tmp_path: Path):
    group = tmp_path / "fs" / "box" / "inner"
    group.mkdir(parents=True)
    (tmp_path / "cgroup").write_text("0::/box/inner\n")
    (group / "memory.max").write_text("max\n")
    (group.parent / "memory.max").write_text("1000000\n")
    for folder in (group, group.parent):
        (folder / "memory.current").write_text("700000\n")
        (folder / "memory.stat").write_text("anon 1\ninactive_file 50000\n")
    assert machine._free_of_groups(tmp_path / "fs", tmp_path / "cgroup") == [350_000]


def test_a_group_of_the_first_version(tmp_path: Path):
    group = tmp_path / "fs" / "memory" / "box"
    group.mkdir(parents=True)
    (tmp_path / "cgroup").write_text("5:cpu:/x\n4:memory:/box\n")
    (group / "memory.limit_in_bytes").write_text("9000\n")
    (group / "memory.usage_in_bytes").write_text("4000\n")
    (group / "memory.stat").write_text("total_inactive_file 500\n")
    assert machine._free_of_groups(tmp_path / "fs", tmp_path / "cgroup") == [5500]


# ---- refusals, and the command ----


def test_the_longest_batch_may_come_late(checkpoint: Callable[[str], Path]):
    words = ["good"] * 7 + [" ".join(["good"] * 40)] + ["bad"] * 8
    rows = splits(train=[{"text": text, "label": int("bad" in text)} for text in words])

    def planned(strategy: str) -> tuple[sums.Sums, forecasts.Forecast]:
        given = {**SETTINGS, "train_sampling_strategy": strategy, "per_device_train_batch_size": 4}
        asked = preparing.make_plan(str(checkpoint("bert")), classification(), "full/default", given)
        found = planning.count(asked, copy.copy(rows), 1)
        return found[2], forecasts.forecast(found[2], found[1], 0)

    (late, by_chance), (early, sorted_first) = planned("sequential"), planned("group_by_length")
    assert late.schedule.first.width < late.schedule.longest.width == early.schedule.first.width
    assert by_chance.longest == sorted_first.longest
    assert late.later is not None and late.later.kinds[ACTIVATIONS] == early.first.kinds[ACTIVATIONS]


def test_wrong_figures_are_refused(checkpoint: Callable[[str], Path]):
    given: dict[str, Any] = {"model": str(checkpoint("bert")), "task": classification(), "adapter": "full/default"}
    with pytest.raises(RecipeError, match="gflops: -1 is no speed"):
        ptft_hf.plan(**given, gflops=-1)
    with pytest.raises(RecipeError, match="probe: needs data that a process of its own can read"):
        ptft_hf.plan(**given, data=data("sequence_classification"), probe=True)


def test_a_model_that_cannot_be_run_without_weights_is_named(
    checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
):
    def fails(*_: Any) -> None:
        raise NotImplementedError("no shape for this")

    monkeypatch.setattr(planning, "count_run", fails)
    with pytest.raises(ModelError, match=r"bert with full/default: cannot be run without its weights.*no shape for"):
        counted_run(checkpoint("bert"))


def test_the_command_prints_a_table_or_json(ptft: Ptft, task_file: Path, checkpoint: Callable[[str], Path]):
    flags = ["--model", checkpoint("bert"), "--task", task_file, "--adapter", "lora/r8_attention"]
    shown = ptft("plan", *flags, "--memory", "64GiB")
    assert shown.code == 0, shown.err
    assert shown.out.rstrip().endswith("it fits in 68,719 MB") and "roughly 0 s of training" in shown.out
    assert "activations" in shown.out
    taken = json.loads(ptft("plan", *flags, "--json").out)["peak_memory_mb_with_proof"]
    close = ptft("plan", *flags, "--memory", f"{int(taken * 1.1)}MB").out
    assert "it fits in" in close and "by less than a forecast may be wrong: it may not" in close
    found = json.loads(ptft("plan", *flags, "--json").out)
    assert found["steps"] == 12
    assert found["peak_memory_mb"] > found["stages_mb"]["training"]["baseline"]


@pytest.mark.slow
def test_a_probe_corrects_the_forecast(ptft: Ptft, task_file: Path, checkpoint: Callable[[str], Path]):
    flags = ["--model", checkpoint("bert"), "--task", task_file, "--adapter", "full/default"]
    found = json.loads(ptft("plan", *flags, "--probe", "--json").out)
    assert found["probed"]
    assert found["stages_mb"]["training"]["measured by the probe"] > 50
    assert found["counted_peak_memory_mb"] != found["peak_memory_mb"]


def test_a_probe_tells_of_what_its_frozen_layers_computed(
    task_file: Path, checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tokens: list[int] = []

    def compute(self: Any, batch: Any) -> Any:
        tokens.append(int(batch["attention_mask"].sum()))
        return of_layers(self, batch)

    def fill(*args: Any) -> None:
        tokens.clear()  # of what was tried before
        of_rows(*args)

    of_layers, of_rows = FrozenLayers.compute, frozen.fill
    monkeypatch.setattr(FrozenLayers, "compute", compute)
    monkeypatch.setattr(frozen, "fill", fill)
    model, adapter = str(checkpoint("bert")), "partial/top_2_layers"
    settings = {"num_train_epochs": 3, "per_device_train_batch_size": 4}
    asked = preparing.make_plan(model, recipes.load_task(str(task_file)), adapter, settings)
    _, arguments, counted = planning.count(asked, None, 1)
    wanted = probing.order(model, asked, adapter, 1, counted, arguments)
    found = probing.probe({**wanted, "folder": str(tmp_path)})
    assert found["filled_tokens"] == sum(tokens) > 0
