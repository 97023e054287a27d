"""Runs every benchmark: `python -m benchmarks`."""

from benchmarks import demo, objectives, phantom, weights

phantom.main()
weights.main()
demo.main()
objectives.main()
