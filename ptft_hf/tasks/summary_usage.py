"""What the model card shows of a model that writes summaries: lines of upstream's libraries alone."""

from __future__ import annotations

from ptft_hf.recipes.summarization import DOCUMENT
from ptft_hf.tasks import Usage
from ptft_hf.tasks.prompting import Speech

SAMPLES = (
    "The river rose by two metres in the night. By morning the old bridge was closed, and the school on the far "
    "bank sent word that lessons would be held in the town hall until the water falls.",
    "Ann asked whether the shop was open on Sunday. Ben said that it was, but only until noon, so they agreed to "
    "meet there at ten.",
)
ENCODER_USAGE = """text = "{text}"
inputs = tokenizer({prompt}, return_tensors="pt")  # up to {limit} tokens
with torch.no_grad():
    ids = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
{answer} = tokenizer.decode(ids[0], skip_special_tokens=True).strip()
print({answer})"""
CHAT_USAGE = """text = "{text}"
chat = [{{"role": "user", "content": {prompt}}}]
inputs = tokenizer.apply_chat_template(
    chat, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)  # up to {limit} tokens
with torch.no_grad():
    ids = model.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
{answer} = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
print({answer})"""
DECODER_USAGE = """text = "{text}"
inputs = tokenizer({prompt}, return_tensors="pt")["input_ids"]  # up to {limit} tokens
if inputs[0, -1] == tokenizer.eos_token_id:  # some tokenizers close what they are given
    inputs = inputs[:, :-1]
with torch.no_grad():
    ids = model.generate(input_ids=inputs, attention_mask=torch.ones_like(inputs))
{answer} = tokenizer.decode(ids[0, inputs.shape[1] :], skip_special_tokens=True).strip()
print({answer})"""


def usage(speech: Speech, limit: int) -> Usage:
    """Code and samples for a checkpoint that is spoken to in this way, with prompts of up to ``limit`` tokens."""
    before, _, after = speech.prompt.partition(DOCUMENT)
    prompt = " + ".join([*([repr(before)] if before else []), "text", *([repr(after)] if after else [])])
    code = code_of(speech.kind, SAMPLES[0], prompt, limit, "summary")
    return Usage(code, list(SAMPLES), "", "writes summaries")


def code_of(kind: str, text: str, prompt: str, limit: int, answer: str) -> str:
    """Lines that let a checkpoint of this kind (:data:`ptft_hf.tasks.prompting.PROMPTS`) write.

    Args:
        kind: How it is spoken to.
        text: An example.
        prompt: A Python expression of ``text``.
        limit: Tokens of a prompt.
        answer: The variable for what it writes.
    """
    code = {"chat": CHAT_USAGE, "decoder": DECODER_USAGE}.get(kind, ENCODER_USAGE)
    return code.format(text=text, prompt=prompt, limit=limit, answer=answer)
