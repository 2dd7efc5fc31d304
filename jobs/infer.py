"""`medray infer` as a job: ray job submit -- python jobs/infer.py ..."""

import sys

from medray.cli import main

if __name__ == "__main__":
    sys.exit(main(["infer", *sys.argv[1:]]))
