"""Fewer iterations at a lower temperature of z."""

from functools import partial

from workbench.studies.study import Study


class Temperature(Study):
    title = "A third of the iterations: the temperature of z"
    question = (
        "Tokens of one iteration do not know of each other, and the less they vary, the better "
        "they fit together: a factor on the z that a token starts from, constant or *annealed* "
        "from 1 along the cosine schedule. The student is not trained for it; the policy, its "
        "schedule included, was trained at its own, annealed to 0.4. Annealing and 0.4 were chosen "
        "on seeds 10 and 11, the counts *1-2-2-3-8* by hand on seed 0. The distance at the start "
        "is that of the student in 16 iterations at a temperature of 1."
    )
    seeds = "0,1,2"
    counts = (1, 2, 2, 3, 8)
    temperatures = {"at 0.85": 0.85, "annealed to 0.6": (1.0, 0.6), "annealed to 0.4": (1.0, 0.4)}
    columns = (
        *("frechet", "drift", "quality", "held_out", "precision", "recall", "diversity"),
        "steps",
    )
    verdict = (
        "In 16 iterations annealing to 0.4 changes the student's distance by "
        "{0[K = 16, annealed to 0.4 - K = 16][frechet]}, its held-out reward by "
        "{0[K = 16, annealed to 0.4 - K = 16][held_out]}, its recall by "
        "{0[K = 16, annealed to 0.4 - K = 16][recall]}.",
        "Five iterations by these counts then differ from 16 at a temperature of 1 by "
        "{0[1-2-2-3-8, annealed to 0.4 - K = 16][frechet]} in distance and by "
        "{0[1-2-2-3-8, annealed to 0.4 - K = 16][recall]} in recall, the policy by "
        "{0[policy - K = 16][frechet]} and {0[policy - K = 16][recall]}.",
    )

    def rows(self, lab) -> dict:
        name = "-".join(map(str, self.counts))
        arms = {"K = 16": {}, "K = 5": {"steps": 5}, name: {"steps": self.counts}}
        rows = {}
        for arm, sampling in arms.items():
            rows[arm] = partial(self.arm, lab, "student", sampling)
            for cooling, temperature in self.temperatures.items():
                cooler = sampling | {"temperature": temperature}
                rows[f"{arm}, {cooling}"] = partial(self.arm, lab, "student", cooler)
        rows["policy"] = partial(self.arm, lab, "policy", {})
        rows["policy, at 1"] = partial(self.arm, lab, "policy", {"temperature": 1.0})
        return rows

    @staticmethod
    def arm(lab, kind, sampling) -> dict:
        figures, start = lab.judged(kind, **sampling), lab.judged("student")
        return figures | {"drift": figures["frechet"] / start["frechet"]}
