"""`accelerate launch -m diptych.train CONFIG key=value …`: the verb `diptych train`, once per process."""

import sys

from diptych.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
