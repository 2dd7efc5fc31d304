"""`medray evaluate` as a job: ray job submit -- python jobs/evaluate.py ..."""

import sys

from medray.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
