"""Answer a file of prompts with a model: answer.py MODEL PROMPTS ANSWERS

A line of the prompts file is a prompt and, after a tab, words a right answer contains (one of them, split by `|`).
Decoding is greedy, so the same model on the same kind of device gives the same answers.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

MAX_NEW_TOKENS = 40


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> dict[str, Any]:
    """One greedy answer and what it cost."""
    messages = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    started = time.perf_counter()
    with torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)[0]
    new = tokens[inputs["input_ids"].shape[1] :]
    return {
        "prompt": prompt,
        "answer": tokenizer.decode(new, skip_special_tokens=True).strip(),
        "tokens": len(new),
        "duration_s": round(time.perf_counter() - started, 3),
        "device": str(model.device),
    }


def answer_all(model_folder: str, prompts: Path) -> Iterator[dict[str, Any]]:
    """The answers to the prompts of a file, in its order."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).to(device)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    for line in prompts.read_text(encoding="utf-8").splitlines():
        prompt, _, expected = line.partition("\t")
        if prompt.strip():
            yield {**answer(model, tokenizer, prompt.strip()), "expected": expected.strip()}


def main(model_folder: str, prompts: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    answers = []
    with part.open("w", encoding="utf-8") as stream:
        for found in answer_all(model_folder, prompts):
            answers.append(found)
            stream.write(json.dumps(found, ensure_ascii=False) + "\n")
            print(f"{found['prompt']}\n  {found['answer']}", flush=True)
    part.rename(target)
    outputs = {
        "answers": str(target.resolve()),
        "device": answers[0]["device"],
        "tokens_per_s": round(
            sum(found["tokens"] for found in answers) / sum(found["duration_s"] for found in answers), 1
        ),
    }
    with Path(os.environ.get("STEP_OUTPUTS", os.devnull)).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(outputs) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
