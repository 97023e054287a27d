"""Runs every benchmark: `python -m benchmarks`."""

from benchmarks import demo, feed, objectives, phantom, weights

phantom.main()
weights.main()
feed.main()
demo.main()
objectives.main()
