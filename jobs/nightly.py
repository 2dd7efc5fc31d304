"""`medray nightly` as a job: ray job submit -- python jobs/nightly.py ..."""

import sys

from medray.cli import script

if __name__ == "__main__":
    script(["nightly", *sys.argv[1:]])
