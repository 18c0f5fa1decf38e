"""What a model can do: intervals, counts, tables, the plot."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rl.evaluation import EvaluationReport, converse, evaluation_report, table, tally, transcript, wilson
from rl.evaluation_plot import plot_evaluation
from rl.prompts import PromptSet, stream
from rl.rollout import RolloutSettings
from rl.scripted import ScriptedEngine, oracle
from rl.tokenizer import TinyTokenizer
from rl.types import Task, Trajectory

TOKENIZER = TinyTokenizer()
BRIEF = RolloutSettings(prompt_style="brief")
SIMPLE, HARD = Task(name="simple"), Task(name="compositional", difficulty="hard")


def sloppy(conversation: str) -> str:
    """Right about single words, adds up badly."""
    said = oracle(conversation)
    return f"{said}1" if "+" in said or "*" in said or "- " in said else said


async def mixed() -> list[Trajectory]:
    prompts = [*stream(SIMPLE, 42, 10), *stream(HARD, 42, 6)]
    return await converse(ScriptedEngine(TOKENIZER, sloppy, version=2), TOKENIZER, prompts, BRIEF, concurrency=3)


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [
        # Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3; the last by symmetry.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0),
    ],
)
def test_the_interval_is_wilsons(successes: int, count: int, low: float, high: float) -> None:
    found = wilson(successes, count)
    assert (found.low, found.high) == (pytest.approx(low, abs=6e-5), pytest.approx(high, abs=6e-5))


@given(st.integers(0, 200), st.integers(0, 200), st.floats(0.5, 0.999))
def test_the_interval_holds_the_share(successes: int, failures: int, confidence: float) -> None:
    count = successes + failures
    found = wilson(successes, count, confidence)
    assert 0 <= found.low <= found.high <= 1
    assert not count or found.low <= successes / count <= found.high


def test_more_successes_than_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="successes must be 0 to the count, got 3 of 2"):
        wilson(3, 2)


async def test_conversations_come_in_the_order_of_their_prompts() -> None:
    prompts = [PromptSet([SIMPLE, HARD], "held_out", 0)[index] for index in range(12)]
    done = await converse(ScriptedEngine(TOKENIZER), TOKENIZER, prompts, BRIEF, concurrency=5)
    assert [one.prompt for one in done] == prompts
    assert evaluation_report("oracle", done).overall.accuracy == 1.0


async def test_a_report_counts_by_task_and_overall() -> None:
    report = evaluation_report("sloppy", await mixed(), seeds=(42,))
    simple, hard = report.tasks
    assert (simple.label, simple.num_correct, simple.num_samples, simple.accuracy) == ("simple", 10, 10, 1.0)
    assert (hard.label, hard.num_correct, hard.num_samples) == ("compositional/hard", 0, 6)
    assert (hard.format_rate, hard.mean_turns, hard.mean_tool_calls) == (1.0, 4.0, 3.0)
    assert (simple.mean_turns, simple.mean_tool_calls) == (2.0, 1.0)
    assert report.overall.failure_modes == {
        "success": 10,
        "wrong_format": 0,
        "tool_spam": 0,
        "wrong_answer": 6,
        "truncated": 0,
    }
    assert report.overall.accuracy == 10 / 16
    assert report.overall.accuracy_interval == wilson(10, 16)
    assert report.version == 2
    assert simple.description == "Single LOOKUP call"
    assert EvaluationReport.model_validate_json(report.model_dump_json()) == report
    assert json.loads(report.model_dump_json())["tasks"][1]["failure_modes"]["wrong_answer"] == 6


async def test_the_table_has_a_row_a_task() -> None:
    rows = table(evaluation_report("sloppy", await mixed()))
    assert [row[0] for row in rows] == ["task", "simple", "compositional/hard", "overall"]
    assert len({len(row) for row in rows}) == 1
    assert rows[1] == ["simple", "100.0%", "72.2% - 100.0%", "10/10", "2.0", "1.0", "100.0%", "0", "0", "0", "0"]


def test_nothing_to_count_is_no_error() -> None:
    empty = tally("none", [])
    assert (empty.num_samples, empty.accuracy, empty.accuracy_interval.high) == (0, 0.0, 1.0)
    assert evaluation_report("none", []).tasks == ()


async def test_a_conversation_can_be_read() -> None:
    done = await mixed()
    assert transcript(done[0]).splitlines() == [
        "What is the zorplex value of 'umbrella'?  (simple:42:0)",
        "wanted 30, got 30: success, reward 1.20 (answer)",
        "  1  LOOKUP[umbrella]",
        "     LOOKUP[umbrella] -> 30",
        "  2  [ANSWER] 30",
    ]
    assert "wanted 233700, got 2337001: wrong_answer, reward 0.20" in transcript(done[10])


async def test_the_plot_is_a_picture_written_whole(tmp_path: Path) -> None:
    done = await mixed()
    path = tmp_path / "evaluation.png"
    plot_evaluation([evaluation_report("before", done[10:]), evaluation_report("after", done)], path)
    with Image.open(path) as picture:
        assert picture.format == "PNG" and picture.width > 600
    assert [entry.name for entry in tmp_path.iterdir()] == ["evaluation.png"]
