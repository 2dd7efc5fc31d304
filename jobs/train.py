"""`medray train` as a job: ray job submit -- python jobs/train.py ..."""

import sys

from medray.cli import script

if __name__ == "__main__":
    script(["train", *sys.argv[1:]])
