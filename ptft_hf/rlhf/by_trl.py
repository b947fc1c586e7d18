"""DPO, KTO, GRPO and RLOO by TRL's trainers, with our recipes, checkpoints, proofs and outputs."""

from __future__ import annotations

import copy
import importlib.metadata
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ptft_hf import adapters, card, checkpoints, data, models, recipes, records, report, settings, training
from ptft_hf.allocator import let_go
from ptft_hf.callbacks import MetricsLog, Progress
from ptft_hf.errors import DataError, ModelError, RecipeError
from ptft_hf.models import adapter_kind, plain_model
from ptft_hf.recipes.algorithms import Settings, load_algorithm, option_names
from ptft_hf.recipes.algorithms import said as said_of
from ptft_hf.recipes.prompts import PPOConfig, PromptsRecipe
from ptft_hf.rlhf import reward_names, rewards, roles, saving, trl_rows, trl_trainers
from ptft_hf.rlhf.preparing import check_start, longest_prompt, of_adapter_folder
from ptft_hf.rlhf.records import contents
from ptft_hf.tasks.prompting import render

PROBE = 8
"""Rows on whose prompts the saved and the trained policy are compared."""
BATCH = 32
"""Answers that a reward's classifier reads together."""


def train_by_trl(
    *,
    algorithm: str,
    model: str,
    task: Any,
    adapter: Any,
    output_dir: str | Path,
    reward: Any = None,
    data: Any = None,
    seed: int = 42,
    settings: Mapping[str, Any] | Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train a causal LM on preferences or for a reward by one of TRL's trainers, save it, and prove the save.

    Args:
        algorithm: ``dpo`` or ``kto`` on a recipe of the family ``preference``; ``grpo`` or ``rloo`` on ``prompts``.
        model: Hub id, ``name@revision`` or folder of a causal LM.
        task: Catalogue name or YAML file of a recipe, or the recipe.
        adapter: An adapter recipe, or the folder of an adapter of PEFT on ``model`` (an SFT run), which is trained
            further and is the reference.
        output_dir: The folder that becomes the policy.
        reward: Of ``grpo`` and ``rloo``: as in :func:`ptft_hf.rlhf.ppo.train_ppo`.
        data: Used instead of the recipe's ``data``.
        seed: Of new weights, order of rows, sampling, and any split that is made.
        settings: ``TrainingArguments`` names, ``algorithm.NAME`` for the fields of TRL's config, and ``task.*``,
            ``adapter.*``, ``model.*``. What is not given is TRL's own default, but for reports to other services,
            and for what :data:`ptft_hf.recipes.algorithms.SAMPLING` takes from the recipe's ``ppo``.
        resume: Go on from the newest intact checkpoint.
        overwrite: Replace a run that is in ``output_dir``.

    Returns:
        The content of ``run.json``; its ``metrics`` are TRL's own.

    Raises:
        PtftError: A subclass says what is wrong; before training starts, nothing has been written.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RecipeError(f"algorithm: {algorithm} runs in one process; start it without torchrun")
    pairs = [f"{k}={json.dumps(v)}" for k, v in settings.items()] if isinstance(settings, Mapping) else list(settings)
    earlier = Path(adapter) if recipes.saved_adapter_kind(adapter) == "peft" else None
    recipe = of_adapter_folder(earlier)[0] if earlier else adapter
    given = load_algorithm(algorithm, task, recipe, pairs, further=earlier is not None)
    if given.algorithm.rewards and reward is None:
        raise RecipeError(f"reward: {algorithm} needs one: --reward SOURCE")
    if not given.algorithm.rewards and reward is not None:
        raise RecipeError(f"reward: {algorithm} learns from preferences, without rewards; leave it out")
    folder = Path(output_dir)
    if training.check_output(folder, resume, overwrite):
        report.say(f"{folder} holds the finished run already; nothing to resume")
        return checkpoints.read_json(folder / "run.json")
    if overwrite:
        training.check_sources(folder, [model, adapter, *reward_names.sources(reward_names.several(reward))])
    with without_telemetry():
        run = Run(algorithm, given, model, earlier, folder, reward, data, seed)
        start = records.find_start(folder, run.identity(), True) if resume else None
        run.describe()
        records.begin(folder, run.identity(), start, overwrite and not resume)
        run.train(start)
        return run.finish()


@contextmanager
def without_telemetry() -> Iterator[None]:
    """TRL tells its maker which trainer is used; here nobody is told anything."""
    from huggingface_hub import constants

    before = constants.HF_HUB_DISABLE_TELEMETRY
    constants.HF_HUB_DISABLE_TELEMETRY = True
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_TELEMETRY = before


class Run:
    """A run of one of TRL's trainers."""

    def __init__(
        self,
        name: str,
        given: Settings,
        model: str,
        earlier: Path | None,
        folder: Path,
        reward: Any,
        source: Any,
        seed: int,
    ) -> None:
        import transformers

        self.name, self.given, self.folder, self.seed, self.earlier = name, given, folder, seed, earlier
        source = given.task.data if source is None else source
        if source is None:
            raise DataError(f"{given.task.name}: names no data; add data: to the recipe, or pass data in Python")
        transformers.set_seed(seed)
        self.method = adapters.build(given.adapter, earlier)
        self.arguments = self._arguments()
        self.reference = str(Path(model).resolve()) if Path(model).is_dir() else model
        self.options = models.options_of(self.reference, given.task.model_options)
        reader = str(earlier if earlier and (earlier / "tokenizer_config.json").is_file() else self.reference)
        self.tokenizer = models.load_tokenizer(reader, **models.options_of(reader, self.options))
        splits = trl_rows.load_splits(given.task, source, seed)
        loaded = roles.load_base(self.reference, given.adapter, False, given=earlier, **self.options)
        if loaded.new:
            raise ModelError(f"{model}: no language model: {sorted(loaded.new)[:3]} are not in the checkpoint")
        check_start(earlier, given.adapter, self.reference, loaded, self.options)
        self.fingerprint = loaded.fingerprint
        self.rows, self.fingerprints, self.notes = {}, {}, [*splits.notes]
        for split in ("train", "validation", "test"):
            self.rows[split], notes = self._rows(getattr(splits, split), loaded.model)
            self.fingerprints[split] = data.fingerprint(getattr(splits, split))
            self.notes += [f"{split}: {note}" for note in notes]
        if note := models.ensure_padding(loaded.model, self.tokenizer):
            self.notes.append(note)
        with models.quiet():
            attached = self.method.attach(loaded.model, loaded.head, "CAUSAL_LM")
        self.rewards = None if reward is None else rewards.build(reward_names.several(reward), lambda _: None, BATCH)
        self.contents = contents(earlier or self.reference, reward_names.several(reward), self.rewards)
        self.trainer = self._trainer(attached, loaded.head)

    # ---- rows ----

    def _rows(self, table: Any, model: Any) -> tuple[Any, list[str]]:
        """A split's rows as TRL has them, and what is to be said of them."""
        recipe = self.given.task
        if not isinstance(recipe, PromptsRecipe):
            return trl_rows.pairs_of(table, self.tokenizer, self.name)
        answers = PPOConfig(response_length=self.arguments.max_completion_length or 1)
        longest = longest_prompt(recipe, answers, model, self.tokenizer, "algorithm.max_completion_length")
        return trl_rows.prompts_of(recipe, table, self.tokenizer, longest)

    # ---- the trainer ----

    def _trainer(self, model: Any, head: Sequence[str]) -> Any:
        with models.quiet():
            import trl
        kind = getattr(trl, self.given.algorithm.trainer)
        options: dict[str, Any] = {
            "model": model,
            "args": self.arguments,
            "train_dataset": self.rows["train"],
            "eval_dataset": self.rows["validation"],
            "processing_class": self.tokenizer,
            "callbacks": [Progress("loss"), MetricsLog(self.folder / "metrics.jsonl")],
        }
        if self.rewards is not None:
            options["reward_funcs"] = [self.reward]
        elif adapter_kind(model) is None:
            options["ref_model"] = copy.deepcopy(model)
        try:
            with models.quiet():
                made = trl_trainers.build(kind, self.method, head, **options)
            models.copy_rows(model, "default", "ref")  # which TRL leaves out of its reference
            return made
        except (ValueError, TypeError, NotImplementedError) as error:
            raise RecipeError(f"{kind.__name__} refuses these settings: {error}") from error

    def _arguments(self) -> Any:
        with models.quiet():
            import trl
        kind = getattr(trl, self.given.algorithm.config)
        given = {**self.given.training, **self.given.options}
        checked, problems = settings.check_types(kind, given, "training")
        problems += [
            f"training.{name}: {given[name]!r} has no effect here: {why}"
            for name, why in settings.REFUSED.items()
            if name in given
        ]
        if problems:
            raise RecipeError(*problems)
        defaults = {
            "report_to": "none",
            "disable_tqdm": True,
            "bf16": settings.bf16_is_faster(),
            "use_cpu": not torch.cuda.is_available() and not torch.backends.mps.is_available(),
            "learning_rate": self.method.learning_rate,
        }
        limit = self.given.task.model.get("max_length")
        if limit is not None and "max_length" in option_names(self.given.algorithm):
            defaults["max_length"] = limit
        try:
            with models.quiet():
                return kind(output_dir=str(self.folder / "checkpoints"), seed=self.seed, **{**defaults, **checked})
        except (ValueError, TypeError, ImportError) as error:
            raise RecipeError(f"training: {kind.__name__} refuses these settings: {error}") from error

    def reward(self, prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        """The reward as TRL calls it, on texts or messages, and in its figures."""
        assert self.rewards is not None

        def text(value: Any, prompt: bool) -> str:
            if isinstance(value, str):
                return value
            if prompt:
                return render(self.tokenizer, value, True)
            return "".join(turn["content"] for turn in value)

        asked = [text(prompt, True) for prompt in prompts]
        answers = [text(answer, False) for answer in completions]
        rollouts: Any = None  # of classifiers and functions, which read texts
        return self.rewards(rewards.Answered(asked, answers, rollouts, list(prompts)))

    # ---- the run ----

    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with the run that was stopped."""
        return {
            "algorithm": self.name,
            "model": {"reference": self.reference, "fingerprint": self.fingerprint},
            **said_of(self.given),
            "reward": self.rewards.name if self.rewards else None,
            "contents": self.contents or None,
            "seed": self.seed,
            "data": self.fingerprints,
        }

    def describe(self) -> None:
        model = self.trainer.model
        trainable, total = models.count_parameters(model)
        arguments = self.trainer.args
        report.before_training(
            self.notes,
            {
                "model": f"{self.reference} ({type(plain_model(model)).__name__})",
                "method": f"{self.given.adapter.name}: {trainable:,} of {total:,} parameters",
                "algorithm": f"{self.name} by TRL {importlib.metadata.version('trl')}",
                "rows": ", ".join(f"{name} {len(rows):,}" for name, rows in self.rows.items()),
                "learning": f"rate {arguments.learning_rate:g}, {arguments.num_train_epochs:g} epochs, "
                f"{'bf16 autocast' if arguments.bf16 else 'float32'}",
                **({"reward": self.rewards.name} if self.rewards else {}),
            },
            {},
        )

    def train(self, start: Path | None) -> None:
        with models.quiet():
            self.trainer.train(resume_from_checkpoint=str(start) if start else None)

    def finish(self) -> dict[str, Any]:
        """Evaluate, save beside the final place, prove, publish."""
        model, peak = self.trainer.accelerator.unwrap_model(self.trainer.model), records.peak_memory_mb()
        parameters = models.count_parameters(model)
        if not self.trainer.is_deepspeed_enabled:
            let_go(self.trainer.optimizer)
        metrics = {}
        with models.quiet():
            for split in ("validation", "test"):
                found = self.trainer.evaluate(self.rows[split], metric_key_prefix=split)
                metrics[split] = {
                    name.removeprefix(f"{split}_"): value
                    for name, value in found.items()
                    if isinstance(value, int | float) and math.isfinite(value)
                }
        staging = self.folder / checkpoints.STAGING
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        with models.quiet():
            model = models.in_dtype(self.method.finish(model), torch.float32).eval()
            if adapter_kind(model) is None:
                model.save_pretrained(staging)
            else:
                saving.save_adapter(model, "default", staging)
                models.base_config(plain_model(model)).save_pretrained(staging)
            self.tokenizer.save_pretrained(staging)
        record = self._record(metrics, peak, parameters)
        record["proof"] = self._prove(model, staging)
        checkpoints.write_text(staging / "README.md", card.model_card(record, adapter_kind(model)))
        record["training"]["bytes_on_disk"] = sum(p.stat().st_size for p in staging.rglob("*") if p.is_file())
        report.curves(self.folder / "metrics.jsonl", staging / "curves.png", "loss")
        checkpoints.write_text(staging / "run.json", json.dumps(record, indent=1))
        checkpoints.publish_into(staging, self.folder, last="run.json")
        shown = {name: value for name, value in metrics["test"].items() if "/" in name or name == "loss"}
        report.say(f"{self.name}, test: " + ", ".join(f"{name} {value:.4f}" for name, value in shown.items()))
        report.say(
            f"saved in {self.folder} and proven: loaded back, its logits on {record['proof']['examples']} prompts "
            f"differ by {record['proof']['max_difference']} from those of the trained policy"
        )
        return record

    def _record(self, metrics: Mapping[str, Any], peak: float, parameters: tuple[int, int]) -> dict[str, Any]:
        """The content of ``run.json``."""
        state = self.trainer.state
        trainable, total = parameters
        seconds = next((e["train_runtime"] for e in state.log_history if "train_runtime" in e), 0.0)
        return {
            "ptft_hf": importlib.metadata.version("ptft-hf"),
            "trl": importlib.metadata.version("trl"),
            "stage": self.name,
            "output_dir": str(self.folder),
            "model": {
                "reference": self.reference,
                "policy": str(self.earlier or self.reference),
                "auto_class": "AutoModelForCausalLM",
                "dtype": "float32",
                "options": {k: v if isinstance(v, bool | int | float) else str(v) for k, v in self.options.items()},
                "quantization": self.given.adapter.quantization,
                "fingerprint": self.fingerprint,
                "added_tokens": roles.added_tokens(self.earlier),
            },
            **{name: value for name, value in self.identity().items() if name != "model"},
            "parameters": {"trainable": trainable, "total": total},
            "training": {"seconds": seconds, "steps": state.global_step, "peak_memory_mb": peak},
            "metrics": metrics,
            "notes": self.notes,
            "versions": records.versions(),
            "hardware": records.hardware(1),
        }

    def _prove(self, model: Any, folder: Path) -> dict[str, Any]:
        """Load the policy by plain transformers and PEFT into a fresh base, and compare.

        Raises:
            RoundTripError: It is not the policy that was trained.
        """
        import peft
        import transformers

        rows = self.rows["validation"]
        ids = [torch.tensor([self._ids(row["prompt"])]) for row in rows.select(range(min(PROBE, len(rows))))]
        probe = [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids]

        def reload() -> Any:
            with models.reading(str(folder)):
                if adapter_kind(model) is None:
                    return transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
                base = roles.load_base(self.reference, self.given.adapter, False, given=self.earlier, **self.options)
                return models.in_dtype(peft.PeftModel.from_pretrained(base.model, str(folder)), torch.float32)

        before = checkpoints.logits_on(model, probe)
        return saving.compare_reloaded(before, reload, probe, next(model.parameters()).device)

    def _ids(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt or "a")["input_ids"])
        return list(self.tokenizer(render(self.tokenizer, prompt, True), add_special_tokens=False)["input_ids"])
