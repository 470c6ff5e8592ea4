"""What an update of GSIM and of RL costs."""

import statistics
from collections.abc import Callable
from functools import partial

from maskrl import Distillation, rng, to_tokens
from workbench.studies.study import Study
from workbench.timing import clock


class Cost(Study):
    title = "What an update costs"
    question = (
        "Milliseconds of an update of GSIM, and of RL on the demo's settings with a fixed schedule "
        "of 16 iterations, by its action, on four critical steps or on all; in turns, the median "
        "of the rounds."
    )
    settings = {"learn_steps": False}
    columns = ("ms",)
    rounds = 8
    verdict = (
        "With x an update on all steps takes {0[RL update, x, all / RL update, x, critical][ms]} "
        "times as long as one on the critical steps. With z updates cost next to nothing, and "
        "finding the critical steps costs more than they save.",
    )

    def measure(self, lab, only=()) -> dict:
        times = lab.result("cost", partial(self.times, lab))
        rows = {name: times | {"ms": ms, "minutes": 0.0} for name, ms in times["ms"].items()}
        rows["GSIM update"]["minutes"] = times["minutes"]
        return rows

    def times(self, lab) -> dict:
        updates = {"GSIM update": self.gsim_update(lab)}
        for action in ("z", "x"):
            for how in ("critical", "all"):
                overrides = self.settings | {"action": action, "rl_steps": how}
                training, labels = lab.rl_training(**overrides)
                update = partial(training.update, labels=labels, seed=lab.seed)
                updates[f"RL update, {action}, {how}"] = update
        rounds = {name: [] for name in updates}
        for i in range(self.rounds):
            for name, update in updates.items():
                start = clock(lab.device)
                update(i)
                rounds[name].append(1000 * (clock(lab.device) - start))
        return {"ms": {name: statistics.median(ms[1:]) for name, ms in rounds.items()}}

    @staticmethod
    def gsim_update(lab) -> Callable:
        """update(i), on one batch."""
        generator = rng(lab.seed, "cost")
        images, labels = lab.data.train.batch(lab.settings.batch, generator, lab.device)
        x, training = to_tokens(images, lab.settings), Distillation(lab.teacher, lab.settings)
        return partial(training.update, x=x, labels=labels, seed=lab.seed)
