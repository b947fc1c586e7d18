"""What a PPO run writes: checkpoints that it can be resumed from to the bit, and the finished folder, proven."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ptft_hf import checkpoints, models
from ptft_hf.errors import CheckpointError, RoundTripError
from ptft_hf.models import adapter_kind, plain_model
from ptft_hf.rlhf import roles, sharding

TRAINED, OPTIMIZER, RANDOM, STATE = "trained.safetensors", "optimizer.pt", "random.pt", "trainer_state.json"
LOGS = ("metrics.jsonl", "samples.jsonl")


# ---- checkpoints ----


def save_checkpoint(run: Any, folder: Path) -> None:
    """Policy, critic, optimizer, schedule, controller, random generators and the logs so far; whole or not there.

    Args:
        run: The :class:`ptft_hf.rlhf.ppo.Run`.
        folder: Where checkpoints are.
    """
    tensors = {f"{part}/{name}": p.detach() for part, ps in run.trained.items() for name, p in ps.items()}
    states = run.optimizer if run.zero is None else run.zero
    tensors, optimizer = (gathered(run, state) for state in (tensors, states.state_dict()))
    if not run.is_main:
        return
    staging = folder / f"{checkpoints.STAGING}-{run.update}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    save_file({name: value.cpu().contiguous().clone() for name, value in tensors.items()}, staging / TRAINED)
    torch.save({"optimizer": optimizer, "scheduler": run.scheduler.state_dict()}, staging / OPTIMIZER)
    generators = {"torch": torch.get_rng_state(), "answers": run.generator.get_state()}
    generators |= {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    torch.save(generators, staging / RANDOM)
    kind, keys, *rest = np.random.get_state(legacy=True)
    state = {
        "update": run.update,
        "episode": run.episode,
        "kl_coef": run.controller.value,
        "history": run.history,
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
    }
    (staging / STATE).write_text(json.dumps(state), encoding="utf-8")
    for name in LOGS:
        if (folder.parent / name).is_file():
            shutil.copyfile(folder.parent / name, staging / name)
    checkpoints.publish(staging, folder / f"checkpoint-{run.update}")
    checkpoints.rotate(folder, run.config.save_total_limit, None)


def gathered(run: Any, state: Any) -> Any:
    """A state with its tensors whole, on the CPU, in the main process; others get it without. Of a run that is not
    sharded it is what was given."""
    if not run.sharded:
        return state
    if isinstance(state, dict):
        return {key: gathered(run, value) for key, value in state.items()}
    if isinstance(state, list):
        return [gathered(run, value) for value in state]
    if not isinstance(state, torch.Tensor):
        return state
    found = sharding.whole(state)
    return found.cpu() if run.is_main else None


def load_checkpoint(run: Any, folder: Path) -> None:
    """The inverse of :func:`save_checkpoint`, in place; the logs of the run are cut back to it.

    Raises:
        CheckpointError: The checkpoint is of another run.
    """
    tensors = load_file(folder / TRAINED)
    own = {f"{part}/{name}": p for part, ps in run.trained.items() for name, p in ps.items()}
    if own.keys() != tensors.keys() or any(own[n].shape != tensors[n].shape for n in own):
        raise CheckpointError(
            f"{folder / TRAINED}: not the weights of this run: {sorted(own.keys() ^ tensors)[:5]}"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(sharding.as_part(tensors[name], parameter))
    steps = torch.load(folder / OPTIMIZER, weights_only=True)
    if run.zero is not None:
        run.zero.load_state_dict(steps["optimizer"])
    else:
        trained = [p for group in run.optimizer.param_groups for p in group["params"]]
        for number, state in steps["optimizer"]["state"].items():
            like = trained[number]
            state |= {k: sharding.as_part(v, like) for k, v in state.items() if v.shape == like.shape}
        run.optimizer.load_state_dict(steps["optimizer"])
    run.scheduler.load_state_dict(steps["scheduler"])
    state = checkpoints.read_json(folder / STATE)
    run.update, run.episode, run.history = state["update"], state["episode"], state["history"]
    run.controller.value = state["kl_coef"]
    generators = torch.load(folder / RANDOM, weights_only=True)
    run.generator.set_state(generators["answers"])
    torch.set_rng_state(generators["torch"])
    if "cuda" in generators and torch.cuda.is_available():
        torch.cuda.set_rng_state(generators["cuda"])
    version, values, gauss = state["python"]
    random.setstate((version, tuple(values), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    if run.is_main:
        for name in LOGS:
            text = (folder / name).read_text("utf-8") if (folder / name).is_file() else ""
            checkpoints.write_text(folder.parents[1] / name, text)


def discard_logs(folder: Path) -> None:
    """Of a run that starts from its beginning: what an earlier attempt logged."""
    for name in LOGS:
        (folder / name).unlink(missing_ok=True)


# ---- the finished folder ----


def whole_weights(run: Any) -> list[dict[str, torch.Tensor] | None]:
    """Of a sharded run what :func:`save_policy` saves, of policy and critic, for which all processes send their
    parts; else None."""
    found: list[dict[str, torch.Tensor] | None] = [None, None]
    if run.sharded:
        for place, role in enumerate((run.roles.policy, run.roles.critic)):
            same = place == 1 and role.model is run.roles.policy.model
            found[place] = found[0] if same else gathered(run, dict(role.model.state_dict()))
    return found


def save_policy(run: Any, folder: Path, weights: Sequence[dict[str, torch.Tensor] | None] = (None, None)) -> None:
    """The policy as an ordinary adapter (or whole model) with its tokenizer; the critic in a folder beside it.

    ``weights`` are :func:`whole_weights`."""
    model, critic, tokenizer = run.roles.policy.model, run.roles.critic, run.ready.tokenizer
    folder.mkdir(parents=True, exist_ok=True)
    with models.quiet():
        if adapter_kind(model) == "peft":
            save_adapter(model, roles.POLICY, folder, weights[0])
            models.base_config(plain_model(model)).save_pretrained(folder)
        else:
            model.save_pretrained(folder, state_dict=weights[0])
        tokenizer.save_pretrained(folder)
        beside = folder / "critic"
        if critic.adapter == roles.CRITIC:
            save_adapter(critic.model, roles.CRITIC, folder, weights[1])  # into a folder of the adapter's name
        elif not run.roles.shares_trunk:
            critic.model.save_pretrained(beside, state_dict=weights[1])
    beside.mkdir(exist_ok=True)
    head = {name: value.detach().cpu().contiguous() for name, value in critic.head.state_dict().items()}
    save_file(head, beside / "value_head.safetensors")


def save_adapter(model: Any, name: str, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """One adapter of several; PEFT puts all but ``default`` into folders of their names. ``weights`` are the model's,
    if its own are sharded."""
    model.save_pretrained(folder, selected_adapters=[name], save_embedding_layers=False, state_dict=weights)
    for place in (folder, folder / name):
        (place / "README.md").unlink(missing_ok=True)  # PEFT's template


def last_logits(run: Any) -> list[torch.Tensor]:
    """Of the trained policy, on some held-out prompts; all processes of a sharded run run it."""
    with run.roles.policy.playing() as model:
        return checkpoints.logits_on(model, _probe(run))


def _probe(run: Any) -> checkpoints.Probe:
    prompts = sorted(run.ready.held_out, key=lambda prompt: -len(prompt.ids))[:8]
    texts = [{"input_ids": p.ids, "attention_mask": [1] * len(p.ids)} for p in prompts]
    return [{name: torch.tensor([text[name]]) for name in text} for text in texts]


def prove(run: Any, folder: Path, before: list[torch.Tensor]) -> dict[str, Any]:
    """Load the policy into a fresh base, by plain transformers and PEFT, and compare its logits with
    :func:`last_logits`.

    Raises:
        RoundTripError: It is not the policy that was trained.
    """
    import peft
    import transformers

    model, plan = run.roles.policy.model, run.plan

    def reload() -> Any:
        if adapter_kind(model) == "peft":
            options = {"given": plan.given, **run.base_options}
            loaded = roles.load_base(plan.base, plan.adapter, run.bf16, **options)
            return peft.PeftModel.from_pretrained(loaded.model, str(folder))
        return transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=model.dtype)

    with models.reading(str(folder)):
        return compare_reloaded(before, reload, _probe(run), run.device)


def compare_reloaded(
    before: list[torch.Tensor], reload: Callable[[], Any], probe: checkpoints.Probe, device: Any
) -> dict[str, Any]:
    """The trained policy's logits against those of what was loaded back.

    Raises:
        RoundTripError: They differ in the least.
    """
    fresh = reload()
    fresh.to(device).eval()
    after = checkpoints.logits_on(fresh, probe)
    if not all(map(torch.equal, before, after)):
        pairs = zip(before, after, strict=True)
        worst = max((one - other).abs().nan_to_num(torch.inf).max().item() for one, other in pairs)
        raise RoundTripError(
            f"the saved policy is not the trained one: its logits differ by up to {worst:.3g}"
        )
    return {"max_difference": 0.0, "examples": len(probe)}
