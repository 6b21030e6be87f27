"""A script that trains until it is ended from outside: ``endless.py FOLDER [init]``. Run by test_endings.py."""

import sys
from pathlib import Path

import ray
from jobs_for_tests import slowly, trainer

if __name__ == "__main__":
    if "init" in sys.argv:
        ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    job = trainer(Path(sys.argv[1]), (1, 2), {"loss": slowly(0.005)}, {"epochs": None, "steps": 1_000_000})
    job.fit()
