"""The data behind the Zorplex tasks: for a seed, the same tables and keys as the original's, to the bit.

seed -> value_table (simple, compositional, multi_step); redirect_table (recursive); fetch_key (multi_step)
"""

import hashlib
import random
from collections.abc import Mapping
from itertools import pairwise

WORDS = (
    *("apple", "banana", "cat", "dog", "elephant", "fish", "grape", "house", "ice", "jungle", "kite", "lemon", "moon"),
    *("night", "ocean", "piano", "queen", "river", "sun", "tree", "umbrella", "violet", "water", "xray", "yellow"),
    "zebra",
)
SEE = "SEE: "
"""What a redirect starts with: `SEE: banana`."""


def value_table(seed: int) -> dict[str, int]:
    """Word to value, 1 to 100."""
    rng = random.Random(seed)
    return {word: rng.randint(1, 100) for word in WORDS}


def fetch_key(word: str, seed: int) -> str:
    """The key that `GETKEY` gives for a word, e.g. `ZK_6368CC`."""
    return f"ZK_{hashlib.md5(f'{word}_{seed}'.encode(), usedforsecurity=False).hexdigest()[:6].upper()}"


def redirect_table(seed: int, max_depth: int, rng: random.Random) -> dict[str, int | str]:
    """Word to value for one half of the words, to `SEE: <other word>` for the other.

    `rng` is left as the original leaves it, since the questions are drawn from it next. Where the original's chains
    grew beyond `max_depth` redirects, the words at their start skip ahead; a word's final value stays the same.
    """
    values = value_table(seed)
    words = list(WORDS)
    rng.shuffle(words)
    terminals, redirectors = words[: len(words) // 2], words[len(words) // 2 :]
    target: dict[str, str] = {}
    for number, word in enumerate(redirectors):
        chain = [word]
        others = [other for other in redirectors if other != word]
        for _ in range(number % max_depth):
            chain.append(rng.choice(others))
            others.remove(chain[-1])
        chain.append(rng.choice(terminals))
        target.update(pairwise(chain))

    def chain_of(word: str) -> list[str]:
        found = [word]
        while found[-1] in target:
            found.append(target[found[-1]])
        return found

    shortened = {word: chain[-max_depth] for word in target if len(chain := chain_of(word)) > max_depth + 1}
    target.update(shortened)
    return {**{word: values[word] for word in terminals}, **{word: SEE + other for word, other in target.items()}}


def resolve(table: Mapping[str, int | str], word: str) -> list[str]:
    """The words from `word` to the one with a value, both included."""
    chain = [word]
    for _ in range(len(table)):
        found = table[chain[-1]]
        if isinstance(found, int):
            return chain
        chain.append(found.removeprefix(SEE))
    raise AssertionError(f"the redirects of `{word}` go round in a circle")
