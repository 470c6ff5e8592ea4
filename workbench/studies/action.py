"""Which action should RL take?"""

from functools import partial

import torch

from workbench.studies.budget import SavedBytes
from workbench.studies.study import Reinforcements


class Action(Reinforcements):
    title = "Which action? (RL at a fixed number of steps)"
    question = (
        "Quality alone is the reward, in 8 iterations, all of which are optimised: the action z or "
        "x, by the policy gradient or by the reward's own gradient (MARVAL-RL, backprop). *graph*: "
        "what autograd keeps for an update."
    )
    note = (
        "**Re-noising**, a third action, was measured and taken out again. The student's token is "
        "noised to sigma / alpha = 1, which is the action, and one more call of the head cleans it "
        "up. Three seeds: after 400 more updates of GSIM for it, RL brought the quality from 0.809 "
        "to 0.861 and the held-out reward from 0.540 to 0.554 (medians), both above z and x; the "
        "recall fell from 0.93 to 0.84–0.88, and the distance stayed above that of z and x on "
        "every seed. It is no longer in the tree."
    )
    seeds = "0,1,2"
    settings = {
        "steps": 8,
        "rl_steps": "all",
        "learn_steps": False,
        "alpha": 0.0,
        "temperature": 1.0,  # as the start
        "rl_iters": 40,
    }
    columns = (
        *("quality", "held_out", "frechet", "precision", "recall", "kl", "graph_mb", "seconds"),
    )
    arms = {
        "z": {},
        "x": {"action": "x"},
        "backprop, z": {"method": "backprop"},
        "backprop, x": {"method": "backprop", "action": "x"},
    }
    verdict = (
        "x trains the whole generator and climbs faster, in {0[x / z][seconds]} times the time: "
        "its quality is above that of z on {0[x > z][quality]} seeds. The held-out reward of z is "
        "above that of x on {0[z > x][held_out]}, its precision on {0[z > x][precision]}.",
        "The reward's own gradient climbs fastest, and hacks it: the distance is above that of the "
        "start on {0[backprop, z > start][frechet]} seeds with z and "
        "{0[backprop, x > start][frechet]} with x.",
    )
    picture = ("action.png", "the course of RL")

    def rows(self, lab) -> dict:
        rows = {"start": partial(lab.judged, "student", steps=self.settings["steps"])}
        for name, overrides in self.arms.items():
            rows[name] = partial(self.arm, lab, name, self.settings | overrides)
        return rows

    def arm(self, lab, name, overrides) -> dict:
        graph = lab.result(f"graph, {name}", partial(self.graph, lab, overrides))
        return lab.reinforcement(f"action {name}", **overrides) | {"graph_mb": graph["graph_mb"]}

    @staticmethod
    def graph(lab, overrides) -> dict:
        """MB that autograd keeps for one update, weights included."""
        training, labels = lab.rl_training(**overrides)
        saved = SavedBytes()
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
            training.update(0, labels, lab.seed)
        return {"graph_mb": saved.total() / 2**20}
