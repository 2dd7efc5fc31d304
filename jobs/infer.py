"""`medray infer` as a job: ray job submit -- python jobs/infer.py ..."""

import sys

from medray.cli import script

if __name__ == "__main__":
    script(["infer", *sys.argv[1:]])
