"""GSIM of heads alone."""

from functools import partial

from train_distill import train_student
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
