"""`medray evaluate` as a job: ray job submit -- python jobs/evaluate.py ..."""

import sys

from medray.cli import script

if __name__ == "__main__":
    script(["evaluate", *sys.argv[1:]])
