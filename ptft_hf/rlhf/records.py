"""Before the first update of PPO and after its last: what is said, ``run.json``, and the proven folder."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Iterable
from typing import Any

from ptft_hf import card, checkpoints, models, report
from ptft_hf import records as run_records
from ptft_hf.allocator import let_go
from ptft_hf.errors import OutputError
from ptft_hf.planning import Forecast
from ptft_hf.rlhf import reporting, rewards, saving
from ptft_hf.rlhf.preparing import learning_rates


def identity(run: Any) -> dict[str, Any]:
    """What a resumed run must have in common with the run that was stopped."""
    plan = run.plan
    # What changes nothing in the weights may change.
    free = {"stop_on", "num_sample_generations", "save_steps", "save_total_limit"}
    return {
        "model": run.ready.facts,
        "task": plan.task.model_dump(mode="json"),
        "adapter": plan.adapter.model_dump(mode="json"),
        "training": plan.config.model_dump(mode="json", exclude=free),
        "reward": run.ready.reward.name,
        "judge": run.ready.judge.name if run.ready.judge else None,
        "contents": contents(plan.policy, [*plan.reward, plan.judge], run.ready.reward, run.ready.judge) or None,
        "seed": plan.seed,
        "processes": run.world,
        "data": run.ready.fingerprints,
    }


def contents(policy: Any, given: Iterable[Any], *built: rewards.WeightedSum | None) -> dict[str, str]:
    """What stands behind the names of a policy and of rewards, as they were given and built: files of folders and of
    functions, and weights from the Hub."""
    found = rewards.contents(given, policy)
    for reward in [one for some in built if some for one in some.rewards]:
        source = reward.name.partition("#")[0]
        if isinstance(reward, rewards.ClassifierReward) and reward.fingerprint and source not in found:
            found[source] = reward.fingerprint
    return found


def describe(run: Any) -> None:
    """Said before the first update."""
    ready, plan, config = run.ready, run.plan, run.config
    policy = run.roles.policy.model
    counts = {part: sum(p.numel() for p in parameters.values()) for part, parameters in run.trained.items()}
    total = models.count_parameters(policy)[1]
    reference = {"reference": "the adapter that the policy starts from", None: "the base itself"}
    critic = "a head on the policy's trunk" if run.roles.shares_trunk else "weights of its own"
    report.before_training(
        ready.notes,
        {
            "policy": f"{plan.policy} ({type(models.plain_model(policy)).__name__}, {total:,} parameters), "
            f"{plan.adapter.name}",
            "reference": reference.get(run.roles.reference.adapter, "a frozen copy")
            if models.adapter_kind(policy)
            else "a frozen copy",
            "critic": critic,
            "reward": ready.reward.name + (f"; held-out judge {ready.judge.name}" if ready.judge else ""),
            "prompts": f"{len(ready.prompts):,}, up to {max(len(p.ids) for p in ready.prompts)} tokens; answers up "
            f"to {config.response_length}",
            "updates": f"{run.updates:,} of {run.batch:,} answers, {config.num_ppo_epochs} x "
            f"{config.num_mini_batches} steps each, learning rate {learning_rates(plan)[0]:g}, "
            f"{'bfloat16' if run.bf16 else 'float32'}",
        },
        counts,
    )
    for prompt in ready.prompts[:3]:
        report.say(f"  prompt: {prompt.text[-200:]!r}", style="dim")


def finish(run: Any, forecast: Forecast | None = None) -> None:
    """Save, prove, and move into place, ``run.json`` last. Of a sharded run all processes give what they have."""
    folder, staging = run.folder, run.folder / checkpoints.STAGING
    peak = run_records.peak_memory_mb()
    let_go(run.optimizer)
    logits, weights = saving.last_logits(run), saving.whole_weights(run)
    if not run.is_main:
        return
    shutil.rmtree(staging, ignore_errors=True)
    saving.save_policy(run, staging, weights)
    record = make_record(run, peak)
    record["forecast"] = None if forecast is None else forecast.to_dict()
    record["proof"] = saving.prove(run, staging, logits)
    reporting.curves(run.history, staging / "curves.png")
    page = reporting.samples_page(reporting.read_lines(folder / "samples.jsonl"))
    (staging / "samples.html").write_text(page, encoding="utf-8")
    text = card.model_card(record, models.adapter_kind(run.roles.policy.model))
    (staging / "README.md").write_text(text, encoding="utf-8")
    record["training"]["bytes_on_disk"] = sum(p.stat().st_size for p in staging.rglob("*") if p.is_file())
    (staging / "run.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    try:
        checkpoints.publish_into(staging, folder, last="run.json")
    except OSError as error:
        raise OutputError(f"{folder}: the finished run cannot be moved into place: {error}") from error
    reporting.final_table(record)


def make_record(run: Any, peak: float) -> dict[str, Any]:
    """The content of ``run.json``."""
    written = checkpoints.read_json(run.folder / run_records.SETTINGS)
    trainable = sum(p.numel() for part in run.trained.values() for p in part.values())
    held = {id(m): m for role in run.roles.all for m in (role.model, role.head) if m is not None}
    return {
        "ptft_hf": importlib.metadata.version("ptft-hf"),
        "stage": "ppo",
        "output_dir": str(run.folder),
        **{name: written[name] for name in ("model", "task", "adapter", "reward", "judge", "seed", "data")},
        "settings": run.config.model_dump(mode="json"),
        "parameters": {"trainable": trainable, "total": sum(models.count_parameters(m)[1] for m in held.values())},
        "training": {
            "updates": run.updates,
            "answers_per_update": run.batch,
            "seconds": run.seconds,
            "peak_memory_mb": peak,
        },
        "metrics": reporting.ends(run.history),
        "findings": run.findings,
        "notes": run.ready.notes,
        "versions": run_records.versions(),
        "hardware": run_records.hardware(run.world),
    }
