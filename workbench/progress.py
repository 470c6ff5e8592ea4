"""What a run says while it goes on: how long all of it will take; and its log in TensorBoard."""

from typing import Any

from workbench.errors import InputError
from workbench.settings import RunSettings

STAGES = ("teacher", "student", "policy")


def work(stage: str, settings: RunSettings, start: int = 0) -> float:
    """What the updates of a stage cost from step `start` on, in images of a teacher's update.

    The factors are those of the presets tiny and folder on one thread, up to two times off."""
    if stage == "teacher":
        return settings.batch * (settings.teacher_iters - start)
    if stage == "student":
        return 2.5 * settings.batch * (settings.gsim_iters - start)
    alone = max(0, start - settings.rl_iters)  # updates of the schedule alone
    updates = settings.rl_iters - (start - alone)
    if settings.learn_steps and settings.method == "grpo":
        updates += 4 * (settings.schedule_iters - alone)  # of four times the prompts
    return 0.06 * settings.steps * settings.prompts * settings.group * updates


def report_work(n: int, settings: RunSettings, with_policy: bool) -> float:
    """What a report of n images a row costs, most of it the teacher's chain; as `work`."""
    others = settings.steps * (1.0 if with_policy else 0.3)
    return n * (settings.denoise_steps / 10 + others)


def estimated_time(
    run, stage: str, step: int, done: int, stage_seconds: float, run_seconds: float
) -> str:
    """How long the run will take, roughly, in a sentence.

    stage: the one that is running, at `step`; the last `done` of its updates took stage_seconds,
    and all since the run began run_seconds."""
    settings, with_policy = run.settings, hasattr(run.args, "reward")
    later = STAGES[STAGES.index(stage) + 1 : 3 if with_policy else 2]
    n = len(run.data.labels) * run.data.test.balanced_half(settings.judge_n)
    left = work(stage, settings, step) + report_work(n, settings, with_policy)
    left += sum(work(name, settings) for name in later)
    speed = (work(stage, settings, step - done) - work(stage, settings, step)) / stage_seconds
    return (
        f"this run will take about {(run_seconds + left / speed) / 60:.0f} minutes in all: a rough "
        f"estimate, from the speed of the {stage}'s updates"
    )


def summary_writer() -> Any:
    """TensorBoard's SummaryWriter; InputError where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("--tensorboard: it is not installed: pip install tensorboard") from None
    return SummaryWriter
