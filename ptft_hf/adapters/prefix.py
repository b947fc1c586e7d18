"""Prefix tuning (Li & Liang 2021): learned keys and values before those of every attention layer.

PEFT hands a prefix over as a cache of past keys and values. Encoders without a cache (DistilBERT, ALBERT,
ModernBERT) then have none, an encoder-decoder has it in the decoder alone, and gradient checkpointing, which
switches caches off, fails. Here it is put where the paper has it, into the attention function, which
transformers lets one choose: softmax(Q [P_k; K]^T) [P_v; V], in every attention of encoder and decoder, between
them too. Texts keep the positions that they had in pretraining.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ptft_hf.errors import AdapterError, CheckpointError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ATTENTION = "ptft_prefix"
"""The attention implementation by which a model with prefixes goes."""


class Prefix(nn.Module):
    """Keys and values of one attention module.

    Args:
        heads: Number of key and value heads.
        size: Of one head.
        tokens: Length of the prefix.
        network: What makes the keys and values while training (``prefix_projection``); None learns them directly.
    """

    def __init__(self, heads: int, size: int, tokens: int, network: nn.Module | None = None) -> None:
        super().__init__()
        self.shape = (2, tokens, heads, size)
        self.network = [network]  # in a list, since it is every module's, and registered once
        if network is None:
            self.values = nn.Parameter(torch.empty(self.shape))
            nn.init.normal_(self.values, std=0.02)
        else:
            self.out = nn.Linear(network[-2].out_features, 2 * heads * size)  # type: ignore[index]

    def forward(self) -> torch.Tensor:
        """Keys and values, ``[2, heads, tokens, size]``."""
        network = self.network[0]
        values = self.values if network is None else self.out(network())
        two, tokens, heads, size = self.shape
        if network is not None:
            values = values.view(tokens, two, heads, size).transpose(0, 1)
        return values.transpose(1, 2)


class PrefixNetwork(nn.Sequential):
    """The paper's reparametrisation: an embedding of each virtual token and a hidden layer, which all attention
    modules share; each has a last layer of its own, the rows of the paper's one."""

    def __init__(self, tokens: int, size: int, hidden: int) -> None:
        super().__init__(nn.Embedding(tokens, size), nn.Linear(size, hidden), nn.Tanh())

    def forward(self) -> torch.Tensor:  # type: ignore[override]
        """``[tokens, hidden]``"""
        embedding, hidden, squash = self
        return squash(hidden(embedding.weight))  # type: ignore[no-any-return]


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> Any:
    """transformers' SDPA attention over ``[batch, heads, tokens, size]``, with the module's prefix in front.

    No mask and no relative distance applies to a prefix.
    """
    prefix = getattr(module, "prefix", None)
    if isinstance(prefix, Prefix):
        keys, values = prefix().to(key.dtype).unsqueeze(1).expand(-1, len(key), -1, -1, -1)
        key, value = torch.cat([keys, key], 2), torch.cat([values, value], 2)
        if attention_mask is not None:
            seen = attention_mask.dtype == torch.bool
            attention_mask = pad(attention_mask, (keys.shape[2], 0), value=seen)
        if options.get("position_bias") is not None:
            options["position_bias"] = pad(options["position_bias"], (keys.shape[2], 0))
    options["is_causal"] = False  # the mask says so; see whole_mask
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def whole_mask(*args: Any, **options: Any) -> Any:
    """SDPA's mask, and never None for causal attention: which query sees what is not a matter of shapes here."""
    return sdpa_mask(*args, **{**options, "allow_is_causal_skip": False})


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, whole_mask)


class PrefixModel(peft.PeftModel):  # type: ignore[misc]
    """A ``PeftModel`` whose prefixes stand in its base's attention modules and are saved under their names.

    Args:
        model: A ``transformers`` model with its head.
        config: ``peft.PrefixTuningConfig``; of its fields ``num_virtual_tokens``, ``prefix_projection`` and
            ``encoder_hidden_size`` matter, and ``modules_to_save``.

    Raises:
        AdapterError: None, or not all, of the model's attention goes through transformers' attention interface.
    """

    adapter_kind = "prefix"

    def _setup_prompt_encoder(self, adapter_name: str) -> None:
        """PEFT's place for it: called before the heads are wrapped."""
        config, model = self.peft_config[adapter_name], self.base_model
        self.base_model.requires_grad_(False)
        found = attention_modules(model)
        tokens, network = config.num_virtual_tokens, None
        if config.prefix_projection and not config.inference_mode:
            network = PrefixNetwork(tokens, config.token_dim, config.encoder_hidden_size)
            self.prompt_encoder = nn.ModuleDict({adapter_name: network})
        for module, (heads, size) in found.items():
            module.prefix = Prefix(heads, size, tokens, network).to(model.device)
        self.attention_before = model.config._attn_implementation
        model.set_attn_implementation(ATTENTION)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's own; the prefixes are inside."""
        return self.base_model(*args, **kwargs)

    def save_pretrained(self, save_directory: Any, state_dict: Any = None, **_: Any) -> None:
        """Prefixes (in the form that is trained) and heads, with what :func:`load` needs to know of them."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        state = self.state_dict() if state_dict is None else state_dict
        names = {n for n, _ in self.named_parameters() if ".prefix." in n or ".modules_to_save." in n}
        save_file({n: state[n].cpu().contiguous() for n in names}, folder / WEIGHTS)
        config = self.peft_config["default"]
        fields = {
            name: getattr(config, name) for name in ("task_type", "num_virtual_tokens", "modules_to_save")
        }
        # PEFT looks for peft_type, and refuses a file without it.
        text = json.dumps({"adapter_kind": self.adapter_kind, "library": "ptft_hf", **fields}, indent=1)
        (folder / CONFIG).write_text(text, encoding="utf-8")

    def unload(self) -> Any:
        """Take the prefixes out and return the base model."""
        for module in self.base_model.modules():
            if isinstance(getattr(module, "prefix", None), Prefix):
                del module.prefix
        self.base_model.set_attn_implementation(self.attention_before)
        return self.base_model

    def merge_and_unload(self) -> Any:
        """Refused.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("keys and values that every text sees cannot be folded into linear layers")

    def load_adapter(self, model_id: Any, adapter_name: str = "default", **_: Any) -> None:
        """The inverse, in place.

        Raises:
            AdapterError: The folder holds other weights than the model has, as PEFT's own prefixes would.
        """
        state = load_file(Path(model_id) / WEIGHTS)
        parameters = dict(self.named_parameters())
        names = {n for n in parameters if ".prefix." in n or ".modules_to_save." in n}
        if state.keys() != names:
            raise AdapterError(
                f"{model_id}: does not hold the prefixes of this model: {sorted(state.keys() ^ names)[:4]}"
            )
        with torch.no_grad():
            for name, value in state.items():
                parameters[name].copy_(value)

    def drop_network(self) -> None:
        """Prefixes as plain keys and values: the network has served training ("can be dropped", section 4.3)."""
        for module in self.base_model.modules():
            prefix = getattr(module, "prefix", None)
            if isinstance(prefix, Prefix) and prefix.network[0] is not None:
                _, tokens, heads, size = prefix.shape
                plain = Prefix(heads, size, tokens)
                plain.values = nn.Parameter(prefix().transpose(1, 2).detach().contiguous())
                module.prefix = plain
        self.__dict__["_modules"].pop("prompt_encoder", None)


def put(model: Any, config: Any) -> PrefixModel:
    """Fresh prefixes on a model; for ``config`` see :class:`PrefixModel`."""
    # PEFT looks for these by names that DistilBERT and others have not.
    text = model.config.get_text_config()
    config.token_dim = config.token_dim or model.get_input_embeddings().embedding_dim
    config.num_attention_heads = config.num_attention_heads or text.num_attention_heads
    return PrefixModel(model, config)


def load(model: Any, folder: Path, *, is_trainable: bool = False) -> PrefixModel:
    """The prefixes and the head that :meth:`PrefixModel.save_pretrained` wrote, on a freshly loaded base.

    Raises:
        CheckpointError: The folder is damaged.
        AdapterError: It is of another architecture.
    """
    try:
        fields = json.loads((folder / CONFIG).read_text("utf-8"))
        fields = {name: fields[name] for name in ("task_type", "num_virtual_tokens", "modules_to_save")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / CONFIG}: not readable as a prefix's: {error}") from error
    wrapped = put(model, peft.PrefixTuningConfig(**fields, inference_mode=not is_trainable))
    wrapped.load_adapter(folder)
    return wrapped


def attention_modules(model: Any) -> dict[nn.Module, tuple[int, int]]:
    """Each module that attends through transformers' interface, with its number of key heads and their size.

    Found by running the model once, so that there is no table of architectures. A module that several layers
    share (ALBERT) is one, and so they share a prefix.

    Raises:
        AdapterError: The architecture has an attention of its own.
    """
    found: dict[nn.Module, tuple[int, int]] = {}

    def record(module: Any, query: Any, key: torch.Tensor, value: torch.Tensor, mask: Any, **kw: Any) -> Any:
        found[module] = (key.shape[1], key.shape[3])
        return sdpa_attention_forward(module, query, key, value, mask, **kw | {"is_causal": False})

    before = model.config._attn_implementation
    AttentionInterface.register(f"{ATTENTION}_record", record)
    AttentionMaskInterface.register(f"{ATTENTION}_record", whole_mask)
    try:
        model.set_attn_implementation(f"{ATTENTION}_record")
        with torch.no_grad():
            model.eval()(**example(model))
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError, NotImplementedError) as error:
        raise AdapterError(f"prefix tuning: {type(model).__name__} cannot take one: {error}") from error
    finally:
        model.set_attn_implementation(before)
    if not found:
        raise AdapterError(
            f"prefix tuning: the attention of {type(model).__name__} is its own and not transformers' interface, so "
            "that no prefix can be put into it; use LoRA"
        )
    return found


def example(model: Any) -> dict[str, torch.Tensor]:
    """A shortest input: four tokens, or one empty image."""
    config = model.config
    if model.main_input_name == "pixel_values":
        size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        return {"pixel_values": torch.zeros(1, config.num_channels, size, size, device=model.device)}
    end = config.get_text_config().eos_token_id
    end = 1 if end is None else end if isinstance(end, int) else end[0]
    inputs = {"input_ids": torch.tensor([[3, 3, 3, end]], device=model.device)}
    if model.can_generate() and config.is_encoder_decoder:  # T5's classifiers make the decoder's inputs themselves
        inputs["decoder_input_ids"] = inputs["input_ids"]
    return inputs
