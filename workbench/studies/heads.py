"""GSIM of heads alone."""

import json
import shutil
from functools import partial

import train_distill
from train_distill import train_student
from workbench.errors import InputError
from workbench.studies.folders import Mnist
from workbench.studies.records import read_result
from workbench.studies.study import Study


class Heads(Study):
    title = "GSIM: whole models, heads alone, or heads first"
    question = (
        "Students of the story's teachers. While heads learn alone the three networks share the "
        "teacher's contexts, and an update takes 0.6 times as long: *equal time* is 1.67 times as "
        "many updates, and *heads first* half of the time for each."
    )
    seeds = "0,1,2"
    columns = ("frechet", "precision", "recall", "quality", "held_out", "updates")
    arms = {  # {row name: settings}
        "heads alone": {"gsim_iters": 650, "heads_iters": 650},
        "heads first": {"gsim_iters": 867, "heads_iters": 542},
    }
    verdict = (
        "At equal updates heads alone differ from whole models by "
        "{0[heads alone - whole][frechet]} in distance, {0[heads alone - whole][recall]} in recall "
        "and {0[heads alone - whole][precision]} in precision; at equal time heads first by "
        "{0[heads first - whole][frechet]}, {0[heads first - whole][recall]} and "
        "{0[heads first - whole][precision]}.",
    )

    def rows(self, lab) -> dict:
        rows = {
            "teacher": partial(lab.judged, "teacher"),
            "whole": partial(lab.judged, "student"),
        }
        for name, settings in self.arms.items():
            rows[name] = partial(lab.result, name, partial(self.distil, lab, name, settings))
        return rows

    @staticmethod
    def distil(lab, name, settings) -> dict:
        """The row of a student, of whose weights those of the best validation are kept."""
        teacher, reward_net = lab.teacher, lab.reward_net
        run = lab.run(name, **settings)
        student = train_student(run, teacher, reward_net)
        return lab.judge_model(student) | {"updates": run.settings.gsim_iters}


class MnistHeads(Study):
    title = "GSIM on MNIST: whole models, heads alone, or heads first"
    question = (
        "Students of teachers that were trained at twice the present learning rates, by `python "
        "train_distill.py --data mnist --teacher TEACHER`. An update of heads alone takes 0.46 "
        "times the processor time of a whole one, so that *heads alone, longer* and *heads first* "
        "take as long as *whole*."
    )
    seeds = "0,1,2"
    columns = ("frechet", "accuracy", "precision", "recall", "diversity", "nearest", "updates")
    arms = {  # {row name: settings}
        "heads alone": {"gsim-iters": 600, "heads-iters": 600},
        "heads alone, longer": {"gsim-iters": 1310, "heads-iters": 1310},
        "heads first": {"gsim-iters": 955, "heads-iters": 655},
    }
    verdict = (
        "From whole models heads alone differ by {0[heads alone - whole][frechet]} in distance, "
        "{0[heads alone - whole][recall]} in recall and {0[heads alone - whole][precision]} in "
        "precision at equal updates; by {0[heads alone, longer - whole][frechet]}, "
        "{0[heads alone, longer - whole][recall]} and {0[heads alone, longer - whole][precision]} "
        "at equal time; heads first, at equal time, by {0[heads first - whole][frechet]}, "
        "{0[heads first - whole][recall]} and {0[heads first - whole][precision]}.",
    )

    def rows(self, lab) -> dict:
        rows = {
            "teacher": partial(self.of_mnist, lab, "teacher"),
            "whole": partial(self.of_mnist, lab, "student"),
        }
        for name, settings in self.arms.items():
            arm = partial(self.distil, lab, name, settings)
            rows[name] = partial(lab.result, f"mnist, {name}", arm)
        return rows

    @staticmethod
    def of_mnist(lab, name) -> dict:
        """A row of the study of MNIST."""
        result = read_result("mnist")
        if not result or str(lab.seed) not in result["rows"][name]:
            raise InputError(f"measure the study mnist first, with --seeds {lab.seed}")
        return result["rows"][name][str(lab.seed)]

    def distil(self, lab, name, settings) -> dict:
        """The row of a student of MNIST's teacher, by the same judge."""
        trained = lab.out / "mnist"
        out = trained / name
        out.mkdir(exist_ok=True)
        for network in ("judge.pt", "reward.pt"):
            shutil.copy(trained / network, out)
        options = Mnist().arguments(out, lab) + ["--teacher", trained / "teacher.pt"]
        for key, value in settings.items():
            options += [f"--{key}", value]
        train_distill.main([str(word) for word in options])
        metrics = json.loads((out / "metrics.json").read_text())
        return metrics["rows"]["student"] | {"updates": settings["gsim-iters"]}
