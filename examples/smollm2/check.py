"""Check the answers of a model: check.py MODEL PROMPTS ANSWERS

Every prompt has an answer of real words, most answers hold an expected word, and the first prompts are answered the
same when they are asked again. Ends with exit code 1 and a list of what is wrong.
"""

import json
import os
import re
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

ASKED_AGAIN = 3
MIN_RIGHT = 0.6
"""Share of the expected words that must be met: 135 million parameters do not know everything."""


def problems(answers: list[dict[str, str]], prompts: list[str]) -> Iterator[str]:
    """What is wrong with the answers alone."""
    if [found["prompt"] for found in answers] != prompts:
        yield f"got {len(answers)} answers, wanted one for each of the {len(prompts)} prompts in their order"
    for found in answers:
        words = re.findall(r"\w+", found["answer"])
        if not words:
            yield f"`{found['prompt']}` has an answer without a word: `{found['answer']}`"
        elif len(words) > 20 and len(set(words)) < len(words) / 5:
            yield f"`{found['prompt']}` has an answer that repeats itself: `{found['answer']}`"
    asked = [found for found in answers if found["expected"]]
    right = [found for found in asked if is_right(found)]
    if len(right) < MIN_RIGHT * len(asked):
        wrong = ", ".join(f"`{found['prompt']}`" for found in asked if not is_right(found))
        yield f"{len(right)} of {len(asked)} answers hold an expected word, wanted {MIN_RIGHT:.0%}; wrong: {wrong}"


def is_right(found: dict[str, str]) -> bool:
    """True when the answer holds one of the expected words."""
    return any(
        re.search(rf"\b{re.escape(word)}\b", found["answer"], re.IGNORECASE) for word in found["expected"].split("|")
    )


def main(model_folder: str, prompts: Path, answers_file: Path) -> int:
    answers = [json.loads(line) for line in answers_file.read_text(encoding="utf-8").splitlines()]
    lines = [line.partition("\t")[0].strip() for line in prompts.read_text(encoding="utf-8").splitlines()]
    wrong = list(problems(answers, [line for line in lines if line]))
    if not wrong:
        from answer import answer_all

        again = islice(answer_all(model_folder, prompts), ASKED_AGAIN)
        wrong = [
            f"`{first['prompt']}` was answered `{first['answer']}`, then `{second['answer']}`"
            for first, second in zip(answers, again, strict=False)
            if first["device"] == second["device"] and first["answer"] != second["answer"]
        ]
    for line in wrong:
        print(line, file=sys.stderr)
    asked = [found for found in answers if found["expected"]]
    right = f"{sum(map(is_right, asked))} of {len(asked)} hold an expected word"
    print(f"{len(answers)} answers; {right}")
    with Path(os.environ.get("STEP_OUTPUTS", os.devnull)).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"answers": str(answers_file.resolve()), "right": right}) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])))
