"""The Zorplex tasks: exact for a seed, solvable by their tools alone, and scored by what the model wrote itself."""

import asyncio
import hashlib
import itertools
import random
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from rl.prompts import LARGEST_SEED, PromptSet, split_of, stream
from rl.rollout import RolloutSettings, rollout
from rl.scoring import score
from rl.scripted import RandomEngine, ScriptedEngine, oracle
from rl.system_prompts import system_prompt
from rl.tokenizer import TinyTokenizer
from rl.types import Prompt, StopReason, Task, ToolCall, Turn
from rl.zorplex import TASKS, open_task
from rl.zorplex_language import STOP_PATTERN, read_answer, read_tool_calls, writes_results
from rl.zorplex_table import WORDS, fetch_key, redirect_table, resolve, value_table

ALL_TASKS = [
    Task(name="simple"),
    *(Task(name="compositional", difficulty=difficulty) for difficulty in ("easy", "medium", "hard")),
    Task(name="multi_step"),
    *(Task(name="recursive", max_depth=depth) for depth in (3, 2, 1)),
]
"""Every task at every degree of difficulty."""

ORIGINAL_QUESTIONS = {
    "simple": "9f6516ca03fd377c24d696ddb3fe2b53a954b8196b528ea6db9d26931780ad7e",
    "compositional/easy": "c65774cb2f43f55e87a2101322a7c7e01428b78cca8b04e71c302508c36bb75b",
    "compositional/medium": "96aec901a772f64bb301c219a7c99c5f6b35bf11b2c519ee54150bfc2618bb0e",
    "compositional/hard": "5179c8d51c90e48aa20f4c219c687848e87c606fc46c1fa2882087ac209ecd54",
    "multi_step": "9f6516ca03fd377c24d696ddb3fe2b53a954b8196b528ea6db9d26931780ad7e",
    "recursive": "2d16240491d03370eba9f73059750510165b71b99dd480941f249fb192588cc5",
    "recursive/2": "eba4f4c2aef97227009d293cc3e7a33fdd8d1c7c7bab584da4a1285a081744e7",
    "recursive/1": "7a68b1d2a1d13b893221801a7f72ba6143d6b3e29ceefee4bae9818b3afc9806",
}
"""SHA-256 of the first 20 questions and answers of the seeds 0 to 99, made by the original's code."""

tasks = st.sampled_from(ALL_TASKS)
seeds = st.integers(0, LARGEST_SEED)
WRONG = 12345


def first(task: Task, seed: int = 42) -> Prompt:
    return next(open_task(task, seed).prompts())


def test_the_table_of_seed_42_is_the_originals() -> None:
    values = (82, 15, 4, 95, 36, 32, 29, 18, 95, 14, 87, 95, 70, 12, 76, 55, 5, 4, 12, 28, 30, 65, 78, 4, 72, 26)
    assert value_table(42) == dict(zip(WORDS, values, strict=True))
    assert fetch_key("apple", 42) == "ZK_6368CC"


@pytest.mark.parametrize("task", ALL_TASKS, ids=lambda task: task.label)
def test_questions_and_answers_are_the_originals(task: Task) -> None:
    asked = hashlib.sha256()
    for seed in range(100):
        for prompt in itertools.islice(open_task(task, seed).prompts(), 20):
            asked.update(f"{prompt.question}={prompt.answer}\n".encode())
    assert asked.hexdigest() == ORIGINAL_QUESTIONS[task.label]


def test_the_first_questions_of_seed_42() -> None:
    asked = {task.label: [(p.question, p.answer) for p in stream(task, 42, 2)] for task in ALL_TASKS}
    assert asked["multi_step"] == asked["simple"]
    assert asked["simple"] == [
        ("What is the zorplex value of 'umbrella'?", 30),
        ("What is the zorplex value of 'dog'?", 95),
    ]
    assert asked["compositional/hard"][0] == (
        "What is zorplex('umbrella') * zorplex('dog') * zorplex('apple')?",
        233700,
    )
    assert asked["recursive"][0] == ("What is the zorplex value of 'elephant'?", 29)


@given(seeds, st.integers(1, 3))
@example(6, 3)
def test_chains_stay_within_the_documented_depth(seed: int, max_depth: int) -> None:
    task = open_task(Task(name="recursive", max_depth=max_depth), seed)
    redirects = [len(task.solution(prompt)) - 1 for prompt in itertools.islice(task.prompts(), 50)]
    assert min(redirects) >= 1 and max(redirects) <= max_depth


def test_a_chain_that_was_too_long_skips_ahead() -> None:
    table = redirect_table(6, 3, random.Random(6))  # the original's chain: ice tree sun lemon piano grape
    assert resolve(table, "ice") == ["ice", "lemon", "piano", "grape"]
    assert resolve(table, "sun") == ["sun", "lemon", "piano", "grape"]


def test_every_stream_starts_anew() -> None:
    task = open_task(Task(name="recursive"), 3)
    once = list(itertools.islice(task.prompts(), 5))
    assert list(itertools.islice(task.prompts(), 5)) == once
    assert [prompt.number for prompt in once] == [0, 1, 2, 3, 4]
    assert once[3].id == "recursive:3:3"


def test_tools_answer_whatever_is_asked() -> None:
    simple, keys = open_task(Task(name="simple"), 42), open_task(Task(name="multi_step"), 42)
    assert simple.call("LOOKUP", "Apple") == "82"
    assert simple.call("LOOKUP", "otter") == "UNKNOWN"
    assert simple.call("FETCH", "ZK_6368CC") == "UNKNOWN_TOOL"
    assert keys.call("GETKEY", "apple") == "ZK_6368CC"
    assert keys.call("FETCH", "zk_6368cc") == "82"
    assert keys.call("GETKEY", "otter") == "UNKNOWN_WORD"
    assert keys.call("FETCH", "ZK_XYZ987") == "INVALID_KEY"
    assert keys.call("LOOKUP", "apple") == "UNKNOWN_TOOL"


def test_settings_of_another_task_are_refused() -> None:
    with pytest.raises(ValidationError, match="task `simple` has no difficulty, got `hard`"):
        Task(name="simple", difficulty="hard")
    with pytest.raises(ValidationError, match="task `simple` has no max_depth, got `2`"):
        Task(name="simple", max_depth=2)


@settings(max_examples=60)
@given(tasks, seeds, st.integers(0, 30), st.sampled_from(["guided", "brief"]))
def test_the_oracle_is_always_right(task: Task, seed: int, number: int, style: str) -> None:
    prompt = next(itertools.islice(open_task(task, seed).prompts(), number, None))
    tokenizer = TinyTokenizer()
    limits = RolloutSettings.model_validate({"prompt_style": style})
    done = asyncio.run(rollout(ScriptedEngine(tokenizer), tokenizer, prompt, limits, group_id="g"))
    assert (done.failure_mode, done.answer, done.stop_reason) == ("success", prompt.answer, "answer")
    assert done.reward == pytest.approx(1.2)
    needed = open_task(task, seed).solution(prompt)
    assert [call for turn in done.turns for call in turn.tool_calls] == needed


async def test_a_policy_that_knows_nothing_gets_nothing() -> None:
    tokenizer = TinyTokenizer()
    engine, limits = RandomEngine(tokenizer), RolloutSettings(prompt_style="brief")
    prompts = PromptSet(ALL_TASKS, "train", 0)
    done = [await rollout(engine, tokenizer, prompts[n], limits, group_id=str(n)) for n in range(400)]
    assert sum(one.failure_mode == "success" for one in done) == 0
    assert max(one.reward for one in done) <= 0


@settings(max_examples=60)
@given(tasks, seeds, st.integers(1, 3))
def test_the_oracle_goes_on_from_what_others_have_asked(task: Task, seed: int, detours: int) -> None:
    def wander(conversation: str) -> str:
        return "LOOKUP[zebra]" if conversation.count("[Result:") < detours else oracle(conversation)

    prompt, tokenizer = first(task, seed), TinyTokenizer()
    limits = RolloutSettings(prompt_style="brief", max_turns=8)
    done = asyncio.run(rollout(ScriptedEngine(tokenizer, wander), tokenizer, prompt, limits, group_id="g"))
    assert (done.failure_mode, done.answer) == ("success", prompt.answer)


def test_the_oracle_needs_a_question() -> None:
    with pytest.raises(ValueError, match="a Zorplex question was wanted, got 'hello'"):
        oracle("hello")


@pytest.mark.parametrize("name", TASKS)
def test_the_examples_of_a_prompt_are_in_no_table(name: str) -> None:
    text = system_prompt(Task.model_validate({"name": name}).name, "guided")
    example = text.partition("Example:")[2]
    assert "[ANSWER] 61" in example or "[ANSWER] 84" in example
    assert not any(word in example.replace("zorplex", "") for word in WORDS)
    assert "ZK_" not in text or not set("XYZ987") <= set("0123456789ABCDEF")


@given(tasks, st.integers(0, 5), st.integers(0, 200))
def test_what_is_held_out_is_never_trained_on(task: Task, seed: int, index: int) -> None:
    trained, held_out = PromptSet([task], "train", seed)[index], PromptSet([task], "held_out", seed)[index]
    assert split_of(trained) == "train" and split_of(held_out) == "held_out"
    assert trained.table_seed % 2 == 0 and held_out.table_seed % 2 == 1
    assert min(trained.table_seed, held_out.table_seed) > LARGEST_SEED
    assert trained.question != held_out.question and set(trained.words) != set(held_out.words)
    assert PromptSet([task], "train", seed)[index] == trained


def test_the_split_goes_by_the_words_in_any_order() -> None:
    task = Task(name="compositional", difficulty="medium")
    found: dict[frozenset[str], set[str]] = {}
    for prompt in itertools.islice(open_task(task, 1).prompts(), 3000):
        found.setdefault(frozenset(prompt.words), set()).add(split_of(prompt))
    assert all(len(splits) == 1 for splits in found.values())
    held_out = sum(splits == {"held_out"} for splits in found.values()) / len(found)
    assert 0.1 < held_out < 0.3


def test_a_prompt_set_takes_its_tasks_in_turn_and_repeats_none() -> None:
    prompts = PromptSet(ALL_TASKS, "train", 7)
    taken = list(itertools.islice(prompts, 400))
    assert [prompt.task for prompt in taken[: len(ALL_TASKS)]] == ALL_TASKS
    assert len({prompt.id for prompt in taken}) == len(taken)
    assert prompts[399] == taken[399]
    with pytest.raises(ValueError, match="a prompt set needs a task"):
        PromptSet([], "train", 0)


def test_a_recursive_table_without_a_held_out_word_is_passed_over() -> None:
    prompts = PromptSet([Task(name="recursive", max_depth=1)], "held_out", 0)
    assert all(split_of(prompts[index]) == "held_out" for index in range(1500))


def test_a_stream_refuses_the_seeds_of_the_sets() -> None:
    with pytest.raises(ValueError, match="a table seed is 0 to 4294967295, got 4294967296"):
        stream(Task(name="simple"), LARGEST_SEED + 1, 1)


@pytest.mark.parametrize(
    ("text", "cut", "answer"),
    [
        ("[ANSWER] 125", False, 125),
        ("[ANSWER] 125", True, None),
        ("[ANSWER] 125\n", True, 125),
        ("so [answer]-7.", False, -7),
        ("[ANSWER] 233,700", False, 233700),
        ("[ANSWER] 1,2", False, None),
        ("[ANSWER] 12.5", False, None),
        ("[ANSWER] 1 [ANSWER] 2", False, 2),
        ("[ANSWER]", False, None),
        ("[ANSWER] none", False, None),
        ("the answer is 125", False, None),
        ("= 125", False, None),
        ("", False, None),
    ],
)
def test_an_answer_is_the_whole_number_behind_the_tag(text: str, cut: bool, answer: int | None) -> None:
    assert read_answer(text, cut) == answer


@given(st.integers(-(10**6), 10**6))
def test_the_stop_rule_waits_for_the_whole_number(number: int) -> None:
    text = f"I add. [ANSWER] {number}"
    stop = re.compile(STOP_PATTERN)
    assert not any(stop.search(text[:end]) for end in range(len(text) + 1))
    assert stop.search(text + "\n") and stop.search(text + ". Then") and stop.search(text + "<")
    assert not stop.search(text + ".")


def test_tool_calls_are_read_in_the_order_of_the_text() -> None:
    text = "FETCH[ZK_1] then getkey['Cat'] and LOOKUP[ \"dog\" ] but not LOOKUP[] or LOOK[cat]"
    assert read_tool_calls(text) == [("FETCH", "ZK_1"), ("GETKEY", "Cat"), ("LOOKUP", "dog")]


def test_results_that_the_model_writes_are_noticed() -> None:
    assert writes_results("LOOK\n[Result: 5]") and writes_results("[ result :5]")
    assert not writes_results("[ANSWER] 5")


def calls(*pairs: tuple[str, str]) -> tuple[ToolCall, ...]:
    task = open_task(Task(name="simple"), 42)
    return tuple(ToolCall(tool=tool, argument=of, result=task.call(tool, of)) for tool, of in pairs)


LOOKED_UP = Turn(text="LOOKUP[umbrella]", num_tokens=4, tool_calls=calls(("LOOKUP", "umbrella")))
SPAM = tuple(LOOKED_UP for _ in range(5))


@pytest.mark.parametrize(
    ("turns", "stop_reason", "mode", "reward"),
    [
        ((LOOKED_UP, "[ANSWER] 30"), "answer", "success", 1.2),
        (("[ANSWER] 30",), "answer", "success", 1.0),
        (("[ANSWER] 31",), "answer", "wrong_answer", 0.0),
        ((LOOKED_UP, "[ANSWER] 31"), "answer", "wrong_answer", 0.2),
        ((LOOKED_UP, "it is 30"), "no_tool_call", "wrong_format", 0.0),
        ((LOOKED_UP, "30 [ANSWER]"), "no_tool_call", "wrong_format", 0.0),
        ((LOOKED_UP, "[Result: 30]\n[ANSWER] 30"), "answer", "wrong_format", 0.0),
        (("[Result: 30]\n[ANSWER] 30",), "answer", "wrong_format", 0.0),
        ((LOOKED_UP, "it must be"), "max_tokens", "truncated", 0.0),
        ((LOOKED_UP, "it must be"), "aborted", "truncated", 0.0),
        (SPAM, "max_turns", "tool_spam", -0.3),
        ((*SPAM, "[ANSWER] 31"), "answer", "tool_spam", -0.1),
        ((*SPAM, "[ANSWER] 30"), "answer", "success", 0.9),
    ],
)
def test_a_conversation_is_judged_by_what_the_model_wrote(
    turns: tuple[Turn | str, ...], stop_reason: StopReason, mode: str, reward: float
) -> None:
    written = [turn if isinstance(turn, Turn) else Turn(text=turn, num_tokens=1) for turn in turns]
    task = open_task(Task(name="simple"), 42)
    judged = score(task, first(Task(name="simple")), written, stop_reason)
    assert (judged.failure_mode, judged.reward) == (mode, pytest.approx(reward))


def test_the_calls_that_a_question_needs_cost_nothing() -> None:
    task = open_task(Task(name="recursive"), 42)
    prompt = next(prompt for prompt in task.prompts() if len(task.solution(prompt)) == 4)
    turns = [Turn(text="", num_tokens=1, tool_calls=(call,)) for call in task.solution(prompt)]
    turns.append(Turn(text=f"[ANSWER] {WRONG}", num_tokens=1))
    judged = score(task, prompt, turns, "answer")
    assert (judged.failure_mode, judged.reward) == ("wrong_answer", pytest.approx(0.2))
