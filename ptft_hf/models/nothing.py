"""Models from nothing: a configuration, random weights, and a tokenizer trained on the corpus."""

from __future__ import annotations

import hashlib
import inspect
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ptft_hf.errors import ModelError, RecipeError, did_you_mean
from ptft_hf.models.inputs import _positions, load_tokenizer
from ptft_hf.models.loading import LoadedModel, as_dtype, fingerprint
from ptft_hf.models.reading import auto_of, from_pretrained, reading
from ptft_hf.models.structure import head_modules
from ptft_hf.recipes import CONFIG, TokenizerRecipe
from ptft_hf.recipes.faults import FROM_PRETRAINED

BATCH = 1000
ALPHABET = 1000
"""Characters that a WordPiece knows, the most frequent ones, as in upstream's trainer; others are unknown."""
WORDPIECE_MARKS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}
BYTE_MARKS = {
    "bos_token": "<s>",
    "pad_token": "<pad>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
    "cls_token": "<s>",
    "sep_token": "</s>",
}
"""RoBERTa's."""
GENERATOR_MARKS = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
"""GPT-2's end token, which also begins a text; and a padding token of its own, so that no end is mistaken for it."""


# ---- the model ----


def config_of(reference: str, fields: Mapping[str, Any]) -> Any:
    """The configuration that a ``config:`` reference names, with ``fields`` changed.

    Args:
        reference: ``config:`` and a model type (``bert``), a folder, or a hub id (``@revision`` too), of which the
            configuration alone is taken.
        fields: The recipe's ``model:``; those of ``from_pretrained`` are no fields of a configuration.

    Raises:
        ModelError: No such model type or checkpoint, or fields that the configuration does not have.
    """
    import transformers

    name = reference.removeprefix(CONFIG)
    changes = {field: value for field, value in fields.items() if field not in FROM_PRETRAINED}
    own: dict[str, Any] = {}  # not the defaults, some of which follow from others (ResNet's stages from its depths)
    if name in transformers.CONFIG_MAPPING:
        config = transformers.AutoConfig.for_model(name)
    else:
        config = _config_of_checkpoint(reference, name, fields)
        own = config.to_dict()
    wrong = [field for field in changes if not hasattr(config, field)]
    if wrong:
        names = config.to_dict().keys()
        raise ModelError(
            *(
                f"model.{field}: {type(config).__name__} has no such field{did_you_mean(field, names)}"
                for field in wrong
            )
        )
    try:
        return type(config).from_dict({**own, **changes})
    except Exception as error:  # upstream's validation raises errors of several kinds
        first = " ".join(str(error).split())[:300]
        raise ModelError(f"{reference}: the configuration refuses {sorted(changes)}: {first}") from error


def _config_of_checkpoint(reference: str, name: str, options: Mapping[str, Any]) -> Any:
    import transformers

    try:
        return from_pretrained("AutoConfig", name, options)
    except ModelError as error:
        known = did_you_mean(name, transformers.CONFIG_MAPPING.keys())
        raise ModelError(
            f"{reference}: {name!r} is no model type of transformers{known} such as bert, gpt2 or llama, and no "
            f"checkpoint whose configuration could be taken: {error}"
        ) from error


def random_model(
    reference: str, auto_class: str, config: Any, reader: Any, options: Mapping[str, Any]
) -> LoadedModel:
    """A model with random weights, drawn from torch's global generator; see :func:`made_from_config`."""
    model = made_from_config(reference, auto_class, config, reader, options)
    new = frozenset(name for name, _ in model.named_parameters())
    return LoadedModel(model, new, head_modules(model, frozenset()), fingerprint(model))


def made_from_config(
    reference: str, auto_class: str, config: Any, reader: Any, options: Mapping[str, Any]
) -> Any:
    """The model of a configuration. It fits the ``reader``, if that is a tokenizer, which learns how many positions
    it has. Of the ``options`` it heeds ``dtype`` and ``attn_implementation``.

    Raises:
        ModelError: The architecture has no such head, or its sizes do not fit each other.
    """
    auto = auto_of(auto_class, reference, config, {})
    has_words = hasattr(reader, "get_vocab")
    if has_words:
        _fit_vocabulary(config.get_text_config(), reader)
    given = {name: options[name] for name in ("attn_implementation",) if name in options}
    given["dtype"] = as_dtype(options.get("dtype", "float32"))
    try:
        with reading(reference):
            model = auto.from_config(config, **given).eval()
    except ModelError as error:
        raise ModelError(f"{error}; do the sizes under model. fit each other?") from error
    if has_words:
        reader.model_max_length = min(reader.model_max_length, _positions(model) or reader.model_max_length)
    return model


def _fit_vocabulary(text: Any, tokenizer: Any) -> None:
    text.vocab_size = len(tokenizer)
    for name in ("pad", "bos", "eos", "cls", "sep", "mask"):
        # What another vocabulary called its tokens means nothing here.
        if hasattr(text, f"{name}_token_id"):
            setattr(text, f"{name}_token_id", getattr(tokenizer, f"{name}_token_id", None))


def takes_token_types(auto_class: str, config: Any) -> bool:
    """Whether the model tells two texts apart by ``token_type_ids``."""
    import transformers

    kind = getattr(transformers, auto_class)._model_mapping.get(type(config), None)
    kind = kind[0] if isinstance(kind, tuple | list) else kind
    return kind is not None and "token_type_ids" in inspect.signature(kind.forward).parameters


# ---- the tokenizer ----


def tokenizer_of(
    reference: str,
    wanted: str | TokenizerRecipe | None,
    texts: Iterable[str],
    *,
    kind: str,
    token_types: bool,
) -> tuple[Any, str]:
    """The tokenizer of a model from nothing, and where it is from.

    Args:
        reference: The model's, ``config:...``.
        wanted: The recipe's ``tokenizer``.
        texts: The training texts.
        kind: The family's own kind, where the recipe names none.
        token_types: Whether the model takes ``token_type_ids``.

    Raises:
        ModelError: It cannot be read, or knows no text.
    """
    import transformers

    name = reference.removeprefix(CONFIG)
    if wanted is None and name not in transformers.CONFIG_MAPPING:
        wanted = name
    if isinstance(wanted, str):
        return load_tokenizer(wanted), f"the tokenizer is that of {wanted}"
    recipe = wanted or TokenizerRecipe()
    generates = kind == "byte_bpe"
    kind = recipe.kind or kind
    tokenizer = train_tokenizer(texts, recipe, kind, generates=generates, token_types=token_types)
    what = {"wordpiece": "WordPiece", "byte_bpe": "byte-level BPE"}[kind]
    return tokenizer, f"a {what} tokenizer of {len(tokenizer):,} tokens is trained on the training texts"


def train_tokenizer(
    texts: Iterable[str], recipe: TokenizerRecipe, kind: str, *, generates: bool, token_types: bool
) -> Any:
    """WordPiece as BERT's, or byte-level BPE as RoBERTa's or, if it ``generates``, GPT-2's. The same texts in the
    same order give the same tokenizer.

    Raises:
        RecipeError: WordPiece for a model that generates: it loses the white space, which a text needs.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if generates and kind == "wordpiece":
        raise RecipeError("tokenizer.kind: wordpiece loses white space, which a text needs; use byte_bpe")
    marks = WORDPIECE_MARKS if kind == "wordpiece" else GENERATOR_MARKS if generates else BYTE_MARKS
    special = list(dict.fromkeys(marks.values()))
    if kind == "wordpiece":
        made = _wordpiece(texts, recipe, special, marks["unk_token"])
    else:
        made = Tokenizer(models.BPE())
        made.normalizer = normalizers.Lowercase() if recipe.lowercase else None
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, **_options(recipe))
        made.train_from_iterator(_in_batches(texts), trainer)
    if kind == "byte_bpe":
        made.post_processor = processors.ByteLevel(trim_offsets=False)
    if not generates:
        begin, end = marks["cls_token"], marks["sep_token"]
        made.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A {end}",
            pair=f"{begin} $A {end} $B:1 {end}:1",
            special_tokens=[(mark, made.token_to_id(mark)) for mark in (begin, end)],
        )
    names = ["input_ids", *(["token_type_ids"] if token_types else []), "attention_mask"]
    kind_: Any = PreTrainedTokenizerFast
    return kind_(tokenizer_object=made, model_input_names=names, **marks)


def _wordpiece(texts: Iterable[str], recipe: TokenizerRecipe, special: list[str], unknown: str) -> Any:
    """A trained WordPiece. The trainer numbers the pieces inside words by the order of a hash table, which differs
    from run to run and decides between pairs that are equally frequent; so they are numbered before it begins."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    def empty(model: Any) -> Any:
        made = Tokenizer(model)
        # As BERT's: control characters go, Chinese characters are words, and the cased model keeps its accents.
        made.normalizer = normalizers.BertNormalizer(lowercase=recipe.lowercase)
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece()
        return made

    learner, texts = empty(models.WordPiece(unk_token=unknown)), list(texts)
    counts = Counter(c for text in texts for c in learner.normalizer.normalize_str(text) if not c.isspace())
    alphabet = sorted(sorted(counts, key=lambda c: (-counts[c], c))[:ALPHABET])
    first = [*special, *alphabet, *(f"##{c}" for c in alphabet)]
    trainer = trainers.WordPieceTrainer(special_tokens=first, limit_alphabet=0, **_options(recipe))
    learner.train_from_iterator(_in_batches(texts), trainer)
    # Anew from the vocabulary alone: to the learner its whole alphabet is special.
    made = empty(models.WordPiece(learner.get_vocab(), unk_token=unknown))
    made.add_special_tokens(special)
    return made


def _options(recipe: TokenizerRecipe) -> dict[str, Any]:
    return {
        "vocab_size": recipe.vocab_size,
        "min_frequency": recipe.min_frequency,
        "show_progress": False,
    }


def _in_batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """``sha256:...`` of all that a fast tokenizer does."""
    return f"sha256:{hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()}"
