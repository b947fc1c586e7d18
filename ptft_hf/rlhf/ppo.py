"""Proximal policy optimisation of a language model: :func:`train_ppo`, one numbered story.

``torchrun --nproc_per_node 2 -m ptft_hf.rlhf.ppo ...`` runs it on several processes. Each samples and learns from its
share of an update's answers; all of them hold the whole update's numbers, so that whitening, losses and steps are
those of one process. ``accelerate launch --use_fsdp --fsdp_version 2 ...`` shards the models' layers among them,
``--use_deepspeed --zero_stage 2 ...`` what the optimizer holds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptft_hf import checkpoints, models, records, report, training
from ptft_hf.errors import ModelError, RecipeError
from ptft_hf.planning import showing
from ptft_hf.rlhf import (
    doctor,
    forecasting,
    ppo_math,
    reward_names,
    rollouts,
    saving,
    sharding,
    watching,
    zero,
)
from ptft_hf.rlhf.experience import make_experience, read_answers
from ptft_hf.rlhf.learning import learn_from
from ptft_hf.rlhf.preparing import (
    Plan,
    Ready,
    batch_sizes,
    learning_rates,
    make_plan,
    make_schedule,
    number_of_updates,
    prepare,
    uses_bf16,
)
from ptft_hf.rlhf.processes import Processes, run_as
from ptft_hf.rlhf.records import describe, finish, identity
from ptft_hf.rlhf.rewards import Answered
from ptft_hf.tasks.prompts import Prompt


def train_ppo(
    *,
    policy: str | Path,
    reward: Any,
    task: Any,
    output_dir: str | Path,
    adapter: Any = None,
    judge: Any = None,
    data: Any = None,
    seed: int = 42,
    settings: Mapping[str, Any] | Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train a policy by PPO, save it with its critic, and prove the save.

    Args:
        policy: A causal LM: hub id, ``name@revision`` or folder; or the folder of a PEFT adapter on one (an SFT run),
            which is trained further and is also the reference that the KL is measured against. Of a checkpoint the
            reference is the checkpoint itself.
        reward: What is to be maximised (:mod:`ptft_hf.rlhf.rewards`): a text ``[WEIGHT*]SOURCE[#LABEL]``, a function
            ``(prompts, answers) -> floats``, or a list of these, which are added up.
        task: Catalogue name or YAML file of a recipe of the family ``prompts``, or the recipe itself.
        output_dir: The folder that becomes the policy; its critic is in ``critic/``.
        adapter: Of a policy that is a checkpoint: an adapter recipe, or a ``PeftConfig``; ``lora/r16_all_linear`` by
            default. ``full/default`` trains policy and critic in full, as models of their own.
        judge: Another reward, which is not trained for: the doctor looks whether it rises, too.
        data: Used instead of the recipe's ``data``.
        seed: Of new weights, the order of prompts, the answers, and any split that is made.
        settings: ``key=value`` strings as after ``--set``, or a mapping: options of
            :class:`ptft_hf.recipes.prompts.PPOConfig`, and ``task.*``, ``adapter.*``, ``model.*`` for recipe fields.
        resume: Go on from the newest intact checkpoint in ``output_dir``.
        overwrite: Replace a run that is in ``output_dir``.

    Returns:
        The content of ``run.json``.

    Raises:
        PtftError: A subclass says what is wrong; before training starts, nothing has been written.
    """
    # 1. What was asked, and whether the output folder may be written to.
    plan = make_plan(policy, reward, task, adapter, judge, seed, settings)
    folder, fsdp, deepspeed = Path(output_dir), sharding.settings(), zero.settings()
    finished = training.check_output(folder, resume, overwrite)
    if overwrite:
        training.check_sources(folder, [policy, *reward_names.sources([*plan.reward, plan.judge])])
    if finished:
        report.say(f"{folder} holds the finished run already; nothing to resume")
        return checkpoints.read_json(folder / "run.json")

    # 2. What it needs: prompts, one base with an adapter for each part (or models of their own), rewards.
    ready = prepare(plan, data)
    run = Run(plan, ready, folder, fsdp, deepspeed)
    written = identity(run)
    start = records.find_start(folder, written, run.is_main) if resume else None
    forecast = forecasting.before_run(run) if run.is_main else None
    if run.is_main:
        describe(run)
        if forecast is not None:
            showing.before_training(forecast, forecasting.CHANGES)
        records.begin(folder, written, start, overwrite and not resume)
    run.accelerator.wait_for_everyone()

    # 3. Sample, score and learn, update after update.
    if start is not None:
        saving.load_checkpoint(run, start)
    elif run.is_main:
        saving.discard_logs(folder)
    with models.quiet():
        run.learn()

    # 4. Save beside the final place, prove, and only then move into it.
    if run.is_main or run.sharded:
        finish(run, forecast)
    run.accelerator.wait_for_everyone()
    return checkpoints.read_json(folder / "run.json")


class Run(Processes):
    """A run of PPO: its parts, and where it is."""

    def __init__(
        self, plan: Plan, ready: Ready, folder: Path, fsdp: Any = None, deepspeed: dict[str, Any] | None = None
    ) -> None:
        import accelerate

        self.plan, self.ready, self.folder, self.config = plan, ready, folder, plan.config
        self.roles = ready.roles
        super().__init__(accelerate.Accelerator(cpu=not torch.cuda.is_available()), uses_bf16(plan.config))
        if self.accelerator.distributed_type.value == "MEGATRON_LM":
            raise RecipeError(
                "Megatron-LM has models of its own, and PPO has several parts on one base; FSDP 2 shards them "
                "(accelerate launch --use_fsdp --fsdp_version 2)"
            )
        self.sharded = fsdp is not None
        if self.sharded:
            sharding.shard(self.roles, fsdp, self.device)
        self.base_options = plan.base_options
        self.batch, self.step_size = batch_sizes(self.config, self.world)
        own = len(self.share(range(self.batch)))
        self.one_pass = self.step_size == self.batch and own <= self.config.per_device_train_batch_size
        self.updates = number_of_updates(self.config, len(ready.prompts), self.world)
        self.trained = self.roles.trained()
        if self.config.gradient_checkpointing:
            with models.quiet():
                for role in (self.roles.policy, self.roles.critic):
                    plain = models.plain_model(role.model)
                    plain.gradient_checkpointing_enable({"use_reentrant": False})
        self.optimizer = self._optimizer()
        most = self.config.max_grad_norm or math.inf
        self.zero = None if deepspeed is None else zero.Zero(self.optimizer, deepspeed, self, most)
        self.scheduler = make_schedule(self.config, self.optimizer, self.updates)
        self.controller: ppo_math.AdaptiveKLController | ppo_math.FixedKLController
        if self.config.adap_kl_ctrl:
            given = (self.config.kl_coef, self.config.target, self.config.horizon)
            self.controller = ppo_math.AdaptiveKLController(*given)
        else:
            self.controller = ppo_math.FixedKLController(self.config.kl_coef)
        self.generator = torch.Generator().manual_seed(plan.seed)
        self.update = self.episode = 0
        self.history: list[dict[str, Any]] = []
        self.findings: list[dict[str, Any]] = []
        self.seconds = 0.0

    def _optimizer(self) -> torch.optim.Optimizer:
        policy_rate, critic_rate = learning_rates(self.plan)
        groups = [
            {"params": list(self.trained["policy"].values()), "lr": policy_rate},
            {"params": list(self.trained["critic"].values()), "lr": critic_rate},
        ]
        config = self.config
        betas = (config.adam_beta1, config.adam_beta2)
        options: dict[str, Any] = {"foreach": False} if self.sharded else {}  # some are sharded, some are not
        return torch.optim.AdamW(
            groups, betas=betas, eps=config.adam_epsilon, weight_decay=config.weight_decay, **options
        )

    def backward(self, loss: Tensor, last: bool) -> None:
        """Gradients of one of a step's passes, added to those of the passes before; no other follows the ``last``."""
        if self.zero is None:
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            self.zero.backward(loss, last)

    # ---- 3. the story ----

    def learn(self) -> None:
        """All updates that are left."""
        config, started = self.config, time.perf_counter()
        self.findings = doctor.history_of(self.history, config)
        bar = report.bar(self.updates, "PPO", "update", done=self.update, show=self.is_main)
        if self.update == 0 and (self.is_main or self.sharded) and config.num_sample_generations:
            watching.sample_held_out(self)
        with bar:
            while self.update < self.updates:
                # 3.1 The next prompts: each once, in a new order, before any comes again.
                began = time.perf_counter()
                prompts = self.next_prompts()
                half = torch.bfloat16 if self.bf16 else None
                with models.packed_linears(self.roles.policy.model, half):
                    # 3.2 An answer to each, and what the reward and the held-out judge say of it.
                    batch, drawn = self.answer(prompts, self.uniforms(len(prompts)))
                    parts, judged = self.score(batch)
                    scores = self.ready.reward.total(parts)
                    if self.update == 0:
                        self.roles.critic.expect(sum(scores) / len(scores))
                    # 3.3 Log-probabilities under the reference, and the critic's values, before any step is taken.
                    read = read_answers(self, batch.rollouts, drawn)
                # 3.4 Rewards: the KL penalty at each token, the score at the last; and from them advantages.
                experience, figures = make_experience(self, batch.rollouts, scores, read)
                sampled = time.perf_counter()
                # 3.5 Several epochs of minibatches, each an optimizer step on both clipped losses.
                learnt = learn_from(self, experience)
                # 3.6 The log; the schedule and the KL controller move on.
                self.update, self.episode = self.update + 1, self.episode + self.batch
                line = watching.figures(self, experience, figures, learnt, parts, judged)
                line |= {"time/rollout": sampled - began, "time/learning": time.perf_counter() - sampled}
                self.scheduler.step()
                if line["objective/kl"] is not None:  # it is no number; the doctor says so
                    self.controller.update(line["objective/kl"], self.batch)
                watching.log(self, line)
                shown = {"score": line["objective/scores"], "kl": line["objective/kl"]}
                bar.set_postfix(
                    {k: "nan" if v is None else f"{v:.3f}" for k, v in shown.items()}, refresh=False
                )
                bar.update()
                # 3.7 The doctor; samples for people; a checkpoint.
                stop = watching.ask_doctor(self)
                if (self.is_main or self.sharded) and watching.is_due(self, config.num_sample_generations):
                    watching.sample_held_out(self)
                sound = all(finding["name"] != watching.FATAL for finding in self.findings)
                sends = self.is_main or self.sharded or self.zero is not None
                if sends and sound and (stop or watching.saves_now(self)):
                    saving.save_checkpoint(self, self.folder / "checkpoints")
                self.accelerator.wait_for_everyone()
                if stop:
                    after = "--resume goes on with another stop_on" if sound else "they are from before that"
                    raise ModelError(
                        f"the doctor stopped the run at update {self.update}: {stop}",
                        f"its checkpoints: {self.folder / 'checkpoints'}; {after}",
                    )
        self.seconds += time.perf_counter() - started

    # ---- 3.1 and 3.2: prompts, answers, scores ----

    def next_prompts(self) -> list[Prompt]:
        """The update's ``batch`` prompts; their order depends on seed and epoch alone."""
        count = len(self.ready.prompts)
        chosen: list[Prompt] = []
        for number in range(self.episode, self.episode + self.batch):
            epoch, place = divmod(number, count)
            draw = torch.Generator().manual_seed(self.plan.seed * 1_000_003 + epoch)
            if place == 0 or not chosen:
                order = torch.randperm(count, generator=draw).tolist()
            chosen.append(self.ready.prompts[order[place]])
        return chosen

    def uniforms(self, count: int) -> Tensor:
        """``[count, response_length]`` numbers in [0, 1), which all processes draw alike."""
        return torch.rand(count, self.config.response_length, generator=self.generator)

    def answer(
        self, prompts: Sequence[Prompt], uniforms: Tensor, alone: bool = False
    ) -> tuple[Answered, rollouts.LogProbs]:
        """An answer to each prompt; each process samples its share, and gets those of the others, but not what they
        were drawn with."""
        own = range(len(prompts)) if alone else self.share(range(len(prompts)))
        with self.roles.policy.playing() as model, self.autocast():
            answers, drawn = rollouts.generate(
                model,
                [prompts[i].ids for i in own],
                uniforms[list(own)],
                end_ids=self.ready.end_ids,
                pad_id=self.ready.tokenizer.pad_token_id,
                temperature=self.config.temperature,
                batch_size=self.config.local_rollout_forward_batch_size,
                anyone=self.anyone if self.sharded else None,
            )
        if not alone:
            answers = self.gathered(answers, len(prompts))
        ids, pad = [prompt.ids for prompt in prompts], self.ready.tokenizer.pad_token_id
        decode = partial(rollouts.answer_text, self.ready.tokenizer)
        texts = [decode(prompt.ids, answer) for prompt, answer in zip(prompts, answers, strict=True)]
        made = rollouts.collate(ids, answers, self.ready.end_ids, pad, self.device)
        sources = [prompt.source for prompt in prompts]
        return Answered([prompt.text for prompt in prompts], texts, made, sources), drawn

    def score(self, batch: Answered) -> tuple[dict[str, list[float]], list[float] | None]:
        """Each reward's scores by its name, and the held-out judge's; each process scores its share."""
        own = batch.take(torch.tensor(list(self.share(range(len(batch.answers))))))
        parts = self.ready.reward.parts(own)
        judged = None if self.ready.judge is None else self.ready.judge(own)
        count = len(batch.answers)
        found = {name: self.gathered(scores, count) for name, scores in parts.items()}
        return found, None if judged is None else self.gathered(judged, count)


def main() -> None:
    """``torchrun -m ptft_hf.rlhf.ppo ...`` is ``ptft ppo ...`` in several processes."""
    run_as("ppo")


if __name__ == "__main__":
    main()
