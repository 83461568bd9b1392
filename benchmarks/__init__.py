"""What `python bench.py` measures. None of these modules is a program of its own."""

import sys

if sys.argv[0] == "-m":  # Python is looking for one of them to run it: `python -m benchmarks.wave_speed`
    print(
        "benchmarks: not started by themselves; `python bench.py --help` lists the commands", file=sys.stderr
    )
    sys.exit(2)
