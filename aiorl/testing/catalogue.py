"""The catalogue of faults with which a learner runs, reports and does not learn, and which finding tells of each.

docs/catalogue.md says for each id what became of it here: impossible, or caught, and by what test.
"""

from __future__ import annotations

FAULTS = {
    "#1": "a lock of threads used between processes",
    "#2": "agents and models sent between processes by pickle",
    "#3": "each process trains on its own copy of the buffer",
    "#4": "weights that were learned never reach who acts",
    "#5": "threads here, processes there",
    "#6": "a counter that each process has for itself",
    "#7": "one lock for all learners",
    "0.1": "the history of frames is cleared, the buffer is not",
    "0.2": "frames are stacked from another buffer than the one trained on",
    "0.3": "the target network is updated twice",
    "0.4": "(1, F) where (F,) is expected",
    "1.1": "an observation's shape is not the declared one",
    "1.2": "acting and training disagree on the shape of an observation",
    "1.3": "acting and training stack different numbers of frames",
    "2.1": "the buffer's size is read while it changes",
    "2.2": "windows reach across the write head of the ring",
    "2.3": "a row is read while it is written",
    "3.1": "who acts fetches weights at another rhythm than they are published",
    "3.2": "epsilon is that of old weights",
    "3.3": "the target network is not saved or sent with the rest",
    "4.1": "the target is updated in the step and once more around it",
    "4.2": "the target's interval is ignored",
    "4.3": "no gradient accumulation",
    "4.4": "no schedule of the learning rate",
    "5.1": "the buffer never holds enough to begin",
    "5.2": "experience is overwritten before training begins",
    "5.3": "sampling is biased, or priorities are stale",
    "6.1": "the acting side's history and the buffer differ",
    "6.2": "a history is cleared at the wrong time",
    "6.3": "frames are stacked, or returns summed, across the end of an episode",
    "7.1": "rewards of a wrong scale, values that explode",
    "7.2": "rewards so rare that there is nothing to learn from",
    "7.3": "n rewards and gamma to another power",
    "8.1": "tensors on different devices",
    "8.2": "needless transfers between devices",
    "8.3": "a shared model on a device that cannot be shared",
    "9.1": "a learning rate too high or too low",
    "9.2": "batches too small",
    "9.3": "epsilon falls too fast or too slowly",
    "9.4": "the target follows too fast or too slowly",
    "10.1": "a reset that does not reach everybody",
    "10.2": "ends of episodes are wrong",
    "10.3": "the environment's actions are not the learner's",
    "11.1": "only the loss is looked at",
    "11.2": "only the return is looked at",
    "12.1": "training begins before there is data",
    "12.2": "a process dies and nobody notices",
    "12.3": "shared memory is damaged",
    "R1": "every batch is zero",
    "R2": "the gradient is zero",
    "R3": "an update leaves the weights as they were",
    "R4": "reader and writer disagree on how much there is",
}

FOUND_AS = {
    # check_env
    "contract": ("0.4", "1.1", "10.2", "10.3"), "pickling": ("#2",), "not-reproducible": ("10.1",), "unseeded": ("10.1",),
    "carries-over": ("10.1",), "reuses-obs": ("2.3",), "limit-as-termination": ("10.2",), "endless": ("10.2",),
    "crashes": ("12.2",), "hangs": ("12.2",),
    # check_algorithm
    "importable": ("#1", "#2"), "weights": ("#2", "8.3"), "state-incomplete": ("3.3",), "state-weights": ("#4", "3.3"),
    "not-serial": ("#5", "#6"), "columns": ("10.3",), "dtype": ("10.3",), "bootstraps-termination": ("10.2",),
    "cuts-truncation": ("10.2",), "keeps-rollout": ("2.3",), "writes-into-rollout": ("2.3",), "metrics": ("7.1",),
    "off-policy-error": ("3.1",), "ignores-rewards": ("#3", "R1"), "ignores-observations": ("#3", "R1"),
    "no-updates": ("5.1",), "zero-gradient": ("R2",), "unchanged": ("R3",), "unpublished": ("#4",),
    "update-ratio": ("12.1",), "target-share": ("0.3", "4.1", "9.4"), "target-interval": ("4.2",),
    "value": ("7.1", "7.3"), "no-q-values": ("11.1",), "refuses-all": ("10.3",), "action-space": ("10.3",),
    "refused": ("5.1", "5.2", "10.3"), "runs": ("8.1",), "acts-otherwise": ("1.2", "6.1"), "not-learned": ("1.2", "6.1"),
    # check_replay
    "shape": ("0.4", "1.1", "1.2", "1.3"), "uninitialised": ("2.1", "R1"), "empty": ("#3", "5.1"), "size": ("2.1", "R4"),
    "torn": ("2.3", "12.3"), "wrap-around": ("2.2",), "crosses-end": ("6.3",), "n-step-return": ("7.3",),
    "n-step-discount": ("7.3",), "end": ("10.2",), "never-sampled": ("5.3",), "biased": ("5.3",),
    "stale-priorities": ("5.3",), "live-priorities": ("5.3",), "chances": ("5.3",), "importance-weights": ("5.3",),
    "stack": ("0.1", "0.2", "1.3", "6.1", "6.2", "6.3"),
    # check_run
    "failed": ("12.2",), "killed": ("12.2",), "restarts": ("12.2",), "zeros": ("R1",), "no-gradient": ("R2",),
    "no-change": ("R3", "9.1"), "not-finite": ("7.1", "9.1"), "q-explodes": ("7.1", "9.1", "9.4"),
    "never-updated": ("5.1",), "late-start": ("5.1", "12.1"), "staleness": ("3.1", "#4"), "dropped": ("5.2",),
    "ledger": ("R4", "2.1"), "epsilon": ("3.2",), "still-exploring": ("9.3",), "no-episodes": ("10.2",),
    "stopped-exploring": ("9.3",),
    "one-step-episodes": ("10.1", "10.2"), "episodes": ("10.1", "10.2"), "no-reward": ("7.2",), "clipped": ("7.1", "9.1"),
    "target-stands": ("9.4",), "progress": ("11.1", "11.2"), "damaged": ("12.3", "2.3"), "priorities": ("5.3",),
    "loss-only": ("11.1",), "learning-rate": ("4.4",), "batch": ("9.2",),
}  # fmt: skip
"""Code of a finding: the faults that it tells of."""

