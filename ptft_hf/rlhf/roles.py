"""The parts in PPO (policy, reference, critic, reward models, judge), on one base or on models of their own.

On one base each part is an adapter of a single ``PeftModel``, and the reference may be the base alone; the weights of
the base are there once. ``default`` is the policy's adapter, so that plain PEFT saves and loads it as its own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ptft_hf import adapters, checkpoints, models
from ptft_hf.errors import AdapterError, ModelError
from ptft_hf.models import plain_model
from ptft_hf.recipes import AdapterRecipe, PeftRecipe
from ptft_hf.rlhf.rollouts import Rollouts, as_rows, before_tokens, hidden_states

POLICY, REFERENCE, CRITIC, REWARD = "default", "reference", "critic", "reward"
HEAD = "score"
"""Name of the head that transformers puts on decoders for sequence classification."""


class Role:
    """One part: a causal LM in which one adapter is active, or none, and for critics and reward models a head.

    Args:
        model: A ``PeftModel``, which several parts may share, or a plain causal LM.
        adapter: The adapter of a ``PeftModel`` that is active when this part plays; None is the base alone.
        head: ``nn.Linear(H, 1)``, in float32.
    """

    def __init__(self, model: Any, adapter: str | None = None, head: nn.Linear | None = None) -> None:
        self.model, self.adapter, self.head = model, adapter, head

    @contextmanager
    def playing(self, *, checkpointing: bool = False) -> Iterator[Any]:
        """The model with this part's adapter, and afterwards as it was, whatever happens.

        PEFT freezes each adapter that is not active and makes the active one trainable, be it the reference's; here
        what is trained stays trained, and what is frozen frozen.

        Args:
            checkpointing: Compute activations again in the backward pass, which must then be inside the context.

        Raises:
            RuntimeError: Another part of the same model is playing.
        """
        with _adapter(self.model, self.adapter), _checkpointing(self.model, checkpointing):
            yield self.model

    def values(self, rollouts: Rollouts, states: Tensor | None = None) -> Tensor:
        """The head's value before each token of the answers: ``[B, T]``, 0 at padding."""
        assert self.head is not None
        states = hidden_states(self.model, rollouts) if states is None else states
        return as_rows(self.head(before_tokens(states, rollouts.mask).float()).squeeze(1), rollouts.mask)

    @torch.no_grad()
    def expect(self, score: float) -> None:
        """Have a head that knows nothing expect this much, so that it learns what answers differ by and not first, by
        weights that tell them apart, what is common to all."""
        assert self.head is not None
        if self.head.bias is not None and not self.head.weight.any():
            self.head.bias.fill_(score)

    def scores(self, rollouts: Rollouts) -> Tensor:
        """The head's value at the last token of each answer: ``[B]``."""
        assert self.head is not None
        states = hidden_states(self.model, rollouts)
        prompt = states.shape[1] - rollouts.mask.shape[1]
        last = prompt + rollouts.mask.sum(1) - 1
        rows = torch.arange(len(last), device=last.device)
        scores: Tensor = self.head(states[rows, last].float()).squeeze(1)
        return scores


class Roles(NamedTuple):
    """All parts of a run."""

    policy: Role
    reference: Role
    critic: Role
    scorers: dict[Path, Role]
    """Reward models on the same base, and the judge, by their folders; others are :mod:`ptft_hf.rlhf.rewards`'
    affair."""

    @property
    def all(self) -> list[Role]:
        return [self.policy, self.reference, self.critic, *self.scorers.values()]

    @property
    def shares_trunk(self) -> bool:
        """Whether the critic is a head on the policy's own hidden states."""
        return (self.policy.model, self.policy.adapter) == (self.critic.model, self.critic.adapter)

    def trained(self) -> dict[str, dict[str, nn.Parameter]]:
        """What is trained, by part and name: ``policy`` and ``critic``. Each weight once."""
        parts: dict[str, dict[str, nn.Parameter]] = {}
        for name, role in (("policy", self.policy), ("critic", self.critic)):
            seen = {id(p) for part in parts.values() for p in part.values()}
            parts[name] = {
                n: p
                for n, p in role.model.named_parameters()
                if p.requires_grad and id(p) not in seen and _belongs(n, role.adapter)
            }
        assert self.critic.head is not None
        parts["critic"] |= {f"{HEAD}.{n}": p for n, p in self.critic.head.named_parameters()}
        return parts


def _belongs(name: str, adapter: str | None) -> bool:
    """Whether a parameter of a model with several adapters is of this one."""
    return adapter is None or f".{adapter}." in f".{name}."


@contextmanager
def _adapter(model: Any, adapter: str | None) -> Iterator[None]:
    if not hasattr(model, "peft_config"):
        yield
        return
    if getattr(model, "_part_is_playing", False):
        raise RuntimeError("parts on one base play one after the other, not inside each other")
    flags = [(p, p.requires_grad) for p in model.parameters()]
    before = model.active_adapter
    model._part_is_playing = True
    try:
        if adapter is None:
            with model.disable_adapter():
                _restore(flags)
                yield
        else:
            model.set_adapter(adapter)
            _restore(flags)
            yield
    finally:
        model._part_is_playing = False
        model.set_adapter(before)
        _restore(flags)


def _restore(flags: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, trained in flags:
        parameter.requires_grad_(trained)


@contextmanager
def _checkpointing(model: Any, on: bool) -> Iterator[None]:
    """Transformers checkpoints in training mode alone, and dropout must stay off: so the layers' own switch, not that
    of what is in them."""
    layers = [m for m in model.modules() if on and getattr(m, "gradient_checkpointing", False)]
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


# ---- building ----


def on_one_base(
    base: Any,
    recipe: PeftRecipe,
    given: Any = None,
    *,
    rewards: Sequence[Path] = (),
    judge: Path | None = None,
    value_model: str = "adapter",
) -> Roles:
    """All parts as adapters of one base.

    Args:
        base: The causal LM, loaded once; its weights are frozen.
        recipe: The method of PEFT, which :func:`ptft_hf.recipes.ppo.load_ppo` has checked.
        given: The folder of an adapter that the policy starts from and that is then the reference, too (an SFT
            adapter); or a ``PeftConfig`` for a new one; None makes a new one of the recipe. Without a folder the
            reference is the bare base.
        rewards: Folders of reward models that are adapters of the same method on the same base; from the first the
            critic starts, too.
        judge: Such a folder, from which nothing starts.
        value_model: ``adapter`` or ``policy_trunk``.

    Raises:
        AdapterError: The recipe trains weights of the base, too.
        ModelError: A reward's adapter does not fit.
    """
    pretrained = {id(p): name for name, p in base.named_parameters()}
    with models.quiet():
        model = adapters.build(recipe, given).attach(base, (), "CAUSAL_LM")
    if stray := [pretrained[id(p)] for p in model.parameters() if p.requires_grad and id(p) in pretrained]:
        raise AdapterError(
            f"{recipe.name}: would train weights of the base itself ({', '.join(stray[:5])}), which all parts of PPO "
            "share; choose a recipe without bias"
        )
    with models.quiet():
        starts_from = isinstance(given, Path)
        if starts_from:
            model.load_adapter(str(given), REFERENCE, is_trainable=False)
        critic = Role(model, POLICY, new_head(model))
        scorers: dict[Path, Role] = {}
        for folder in dict.fromkeys([*rewards, *([] if judge is None else [judge])]):
            name = f"{REWARD}_{len(scorers) + 1}"
            weights, head = read_reward_adapter(folder, model)
            scorers[folder] = Role(model, name, add_reward(model, folder, name, weights, head))
        if value_model == "adapter":
            critic = _critic(model, scorers[rewards[0]] if rewards else None)
    model.set_adapter(POLICY)
    _freeze(model, critic)
    models.to_float32(p for p in model.parameters() if p.requires_grad)
    model.eval()
    return Roles(Role(model, POLICY), Role(model, REFERENCE if starts_from else None), critic, scorers)


def beside_the_policy(model: Any) -> list[str]:
    """Names of the adapters that are on its base, too."""
    return [name for name in getattr(model, "peft_config", {}) if name != POLICY]


def _freeze(model: Any, critic: Role) -> None:
    """What :func:`Role.playing` then keeps: policy and critic are trained, nothing else is."""
    trained = {POLICY, critic.adapter}
    for name, parameter in model.named_parameters():
        own = any(_belongs(name, adapter) for adapter in model.peft_config)
        parameter.requires_grad_(own and any(_belongs(name, adapter) for adapter in trained))


def new_head(model: Any) -> nn.Linear:
    """``H -> 1``, all 0: a critic that knows nothing expects nothing, and does no harm until it has learnt."""
    size = plain_model(model).get_input_embeddings().weight.shape[1]
    output = plain_model(model).get_output_embeddings()
    size = getattr(output, "in_features", size)
    head = nn.Linear(size, 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head.to(next(model.parameters()).device)


def _critic(model: Any, reward: Role | None) -> Role:
    """A critic with an adapter of its own: the reward model's to start with, or a new one like the policy's."""
    source = POLICY if reward is None else str(reward.adapter)
    config = copy.deepcopy(model.peft_config[source])
    config.inference_mode = False
    model.add_adapter(CRITIC, config)
    if reward is None:
        return Role(model, CRITIC, new_head(model))
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            if _belongs(name, CRITIC):
                parameter.copy_(parameters[f".{name}.".replace(f".{CRITIC}.", f".{source}.")[1:-1]])
    head = copy.deepcopy(reward.head)
    assert head is not None
    return Role(model, CRITIC, head.requires_grad_(True))


def in_full(model: Any, *, value_model: str = "adapter") -> Roles:
    """Policy and critic with all weights trained, and a frozen copy as the reference: three models."""
    reference = copy.deepcopy(model).requires_grad_(False).eval()
    models.unfreeze(model).eval()
    if value_model == "policy_trunk":
        return Roles(Role(model), Role(reference), Role(model, None, new_head(model)), {})
    trunk = copy.deepcopy(model)
    # The critic's own output embeddings take no part; tied ones are its input embeddings and do.
    output, inputs = trunk.get_output_embeddings(), trunk.get_input_embeddings()
    if output.weight is not inputs.weight:
        output.requires_grad_(False)
    return Roles(Role(model), Role(reference), Role(trunk, None, new_head(model)), {})


# ---- a reward model on the same base ----


def is_reward_adapter(folder: Path, base: str, peft_type: str | None) -> bool:
    """Whether a folder holds a reward model (one score) that is an adapter of this method on this base.

    Raises:
        CheckpointError: The adapter's configuration is not readable.
        ModelError: Its weights are not, or are no safetensors.
    """
    from safetensors import safe_open

    path = folder / "adapter_config.json"
    if not path.is_file() or peft_type is None:
        return False
    config = checkpoints.read_json(path)
    if config.get("peft_type") != peft_type or config.get("task_type") != "SEQ_CLS":
        return False
    if not same_place(str(config.get("base_model_name_or_path")), base):
        return False
    weights = folder / "adapter_model.safetensors"
    models.check_adapter_weights(folder)
    with models.reading(str(weights)), safe_open(weights, "pt") as file:
        heads = [key for key in file.keys() if key.endswith(f".{HEAD}.weight")]  # noqa: SIM118
        return len(heads) == 1 and file.get_slice(heads[0]).get_shape()[0] == 1


def same_place(one: str, other: str) -> bool:
    """Whether two references are of one folder, or of one name on the Hub."""
    first, second = (Path(models.located(name, {})[0]) for name in (one, other))
    return first.resolve() == second.resolve() if first.exists() and second.exists() else one == other


def read_reward_adapter(folder: Path, model: Any) -> tuple[dict[str, Tensor], nn.Linear]:
    """The adapter's weights without its head, and the head (frozen), in whose bias a centre of the scores is.

    Raises:
        ModelError: The folder cannot be read.
    """
    from peft.utils import load_peft_weights

    with models.reading(str(folder)):
        weights = load_peft_weights(str(folder), device="cpu")
    inside = {name: name.rpartition(f".{HEAD}.")[2] for name in weights if f".{HEAD}." in name}
    own = {short: weights.pop(name) for name, short in inside.items()}
    if centre := _centre_of(folder):
        own["bias"] = own.get("bias", torch.zeros(1)).float() - centre
    head = nn.Linear(own["weight"].shape[1], 1, bias="bias" in own)
    head.load_state_dict({name: value.float() for name, value in own.items()})
    return weights, head.requires_grad_(False).to(next(model.parameters()).device)


def _centre_of(folder: Path) -> float:
    """What a run of the family ``preference`` takes off its scores; 0 of any other folder."""
    if not (folder / "run.json").is_file():
        return 0.0
    return float(checkpoints.read_json(folder / "run.json").get("task_state", {}).get("centre", 0.0))


def add_reward(model: Any, folder: Path, name: str, weights: Mapping[str, Tensor], head: nn.Linear) -> nn.Linear:
    """Put a reward's adapter on the base, under this name; returns its head.

    Raises:
        ModelError: The adapter has other weights than this base takes.
    """
    import peft
    from peft.utils import set_peft_model_state_dict

    config = peft.PeftConfig.from_pretrained(str(folder))
    config.task_type = "CAUSAL_LM"
    config.modules_to_save = [n for n in config.modules_to_save or () if n.rpartition(".")[2] != HEAD] or None
    model.add_adapter(name, config)
    result = set_peft_model_state_dict(model, dict(weights), adapter_name=name)
    missing = [key for key in result.missing_keys if _belongs(key, name)]
    if missing or result.unexpected_keys:
        raise ModelError(
            f"{folder}: this reward model's adapter does not fit the policy's base: "
            f"{', '.join([*missing, *result.unexpected_keys][:5])}"
        )
    return head


def added_tokens(given: Any) -> dict[str, Any] | None:
    """Those of the run whose adapter the policy starts from, as :func:`ptft_hf.models.give_rows` takes them."""
    if not isinstance(given, Path) or not (given / "run.json").is_file():
        return None
    found: dict[str, Any] | None = checkpoints.read_json(given / "run.json")["model"].get("added_tokens")
    return found


def load_base(
    reference: str, recipe: AdapterRecipe, bf16: bool, loader: Any = models, *, given: Any = None, **options: Any
) -> models.LoadedModel:
    """The causal LM, with rows for the tokens that the ``given`` adapter added; frozen weights in bfloat16 where that
    is asked for, weights that are trained in float32."""
    if bf16 and not recipe.trains_weights:
        options.setdefault("dtype", "bfloat16")
    found: models.LoadedModel = loader.load_model(
        reference, "AutoModelForCausalLM", config={}, quantization=recipe.quantization, **options
    )
    if added := added_tokens(given):
        models.give_rows(found.model, **added)
    return found
