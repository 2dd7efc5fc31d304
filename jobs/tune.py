"""`medray tune` as a job: ray job submit -- python jobs/tune.py ..."""

import sys

from medray.cli import script

if __name__ == "__main__":
    script(["tune", *sys.argv[1:]])
