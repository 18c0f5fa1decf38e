"""What happens in a run, in one line for people."""

from rl.metrics import EvaluationRecord, Notice, RunEvent, UpdateRecord


def event_line(event: RunEvent, updates: int) -> str:
    """An event; `updates` is how many the run is to have."""
    if isinstance(event, Notice):
        return f"{event.event.replace('_', ' ')}: {event.message}"
    if isinstance(event, EvaluationRecord):
        overall = event.report.overall
        interval = overall.accuracy_interval
        return (
            f"held-out accuracy of version {event.version}: {overall.accuracy:.1%} "
            f"({interval.low:.1%} - {interval.high:.1%}, {overall.num_samples} prompts)"
        )
    train = event.train
    return (
        f"update {train.update + 1}/{updates}  reward {train.mean_reward:.3f}  correct {train.correct_rate:.0%}  "
        f"{staleness_words(event)}  {speed_words(event)}  {idle_words(event)}"
    )


def staleness_words(update: UpdateRecord) -> str:
    """How old the data of an update was."""
    return f"staleness {update.train.staleness_mean:.1f} (max {update.train.staleness_max})"


def speed_words(update: UpdateRecord) -> str:
    """What the run gets done."""
    return f"{update.samples_per_s:.1f} samples/s  {update.trained_tokens_per_s:.0f} tokens/s"


def idle_words(update: UpdateRecord) -> str:
    """How long each role waited, since the line before."""
    return f"idle trainer {update.shares.trainer_idle:.0%}, generators {update.shares.generator_idle:.0%}"
