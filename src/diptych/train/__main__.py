"""`accelerate launch -m diptych.train CONFIG key=value …`: the verb `diptych train`, once per process."""

import os
import sys

from diptych.cli import main

if __name__ == "__main__":
    code = main(["train", *sys.argv[1:]])
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything is written and closed. What is left are gloo's threads, and now and then one of them aborts the
    # interpreter's own end (seen with FSDP2: one run in eight), which a launcher takes for a failed run.
    os._exit(code)
